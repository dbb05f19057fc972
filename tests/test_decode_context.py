"""benchmarks/decode_context.py: what a state must weigh, and what the table says."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from decode_context import RWKVColumn, TransformerColumn, bytes_of, bytes_with_room_for, report
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import model_type

CONFIG = ModelConfig(vocab_size=11, num_layers=3, width=128)


def test_a_cache_weighs_a_key_and_a_value_a_position() -> None:
    transformer = CONFIG.transformer_of_equal_size(512)
    for positions in (512, 1024):
        config = dataclasses.replace(transformer, context_length=positions)
        shapes = jax.eval_shape(lambda config=config: model_type(config).initial_block_state(config, 1))
        expected = 4 * 3 * (2 * positions * 128 + 1)
        assert bytes_with_room_for(transformer, positions) == 3 * bytes_of(shapes) == expected


def test_the_table_says_how_far_times_are_apart() -> None:
    class Fixed:
        def bytes_after(self, context: int) -> int:
            return 2_500_000 * (context // 512)

    columns = {"Transformer": Fixed()}
    found = {("Transformer", 512): [0.010, 0.011, 0.050], ("Transformer", 1024): [0.020, 0.022, 0.021]}
    lines = report(columns, [512, 1024], found).splitlines()  # pyright: ignore[reportArgumentType]
    assert lines[2] == "| 512 | **11.0** (10.0 - 50.0) | 2.50 MB |"
    assert lines[3] == "| 1,024 | **21.0** (20.0 - 22.0) | 5.00 MB |"
    assert lines[-1] == "Transformer: the slowest median is 90.9% above the fastest; within 10%: NO"
    found = {("Transformer", 512): [0.010], ("Transformer", 1024): [0.0105]}
    assert report(columns, [512, 1024], found).endswith("5.0% above the fastest; within 10%: yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.long
def test_both_models_are_timed_after_each_context() -> None:
    contexts = [512, 1024]
    for column in (RWKVColumn(CONFIG, contexts), TransformerColumn(CONFIG, contexts, calls=1)):
        for context in contexts:
            assert column.seconds_after(context, calls=1) > 0
        again = column.seconds_after(512, calls=1)  # the state was not used up
        assert again > 0
    assert column.bytes_after(1024) == bytes_with_room_for(CONFIG.transformer_of_equal_size(), 1024)
