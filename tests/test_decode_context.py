"""benchmarks/decode_context.py: what a state must weigh, and what the table says."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from decode_context import RWKVColumn, TransformerColumn, cache_bytes, report, rwkv_state_bytes
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel, model_type

CONFIG = ModelConfig(vocab_size=11, num_layers=3, width=128)


def bytes_of_initial_state(config: ModelConfig) -> int:
    kind: type[LanguageModel] = model_type(config)
    state = jax.eval_shape(lambda: kind.initial_block_state(config, 1))
    return config.num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_states_weigh_what_the_formulas_say() -> None:
    assert rwkv_state_bytes(CONFIG) == bytes_of_initial_state(CONFIG) == 4 * 3 * (2 * 128 + 2 * 64 * 64)
    transformer = CONFIG.transformer_of_equal_size(512)
    assert cache_bytes(transformer, 512) == bytes_of_initial_state(transformer) == 4 * 3 * (2 * 512 * 128 + 1)
    longer = dataclasses.replace(transformer, context_length=1024)
    assert cache_bytes(longer, 1024) == bytes_of_initial_state(longer)


def test_the_table_says_how_far_times_are_apart() -> None:
    class Fixed:
        def bytes_after(self, context: int) -> int:
            return 2_500_000 * (context // 512)

    columns = {"Transformer": Fixed()}
    found = {("Transformer", 512): [0.010, 0.011, 0.050], ("Transformer", 1024): [0.020, 0.022, 0.021]}
    lines = report(columns, [512, 1024], found).splitlines()  # pyright: ignore[reportArgumentType]
    assert lines[2] == "| 512 | **11.0** (10.0 - 50.0) | 2.50 MB |"
    assert lines[3] == "| 1,024 | **21.0** (20.0 - 22.0) | 5.00 MB |"
    assert lines[-1] == "Transformer: the slowest median is 90.9% above the fastest"


@pytest.mark.long
def test_both_models_are_timed_after_each_context() -> None:
    contexts = [512, 1024]
    for column in (RWKVColumn(CONFIG, contexts), TransformerColumn(CONFIG, contexts, calls=1)):
        for context in contexts:
            assert column.seconds_after(context, calls=1) > 0
        again = column.seconds_after(512, calls=1)  # the state was not used up
        assert again > 0
    assert column.bytes_after(1024) == cache_bytes(CONFIG.transformer_of_equal_size(1024), 1024)
