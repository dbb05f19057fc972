"""benchmarks/engine_throughput.py: whether its table tells the truth, and its clock runs over whole bursts."""

from __future__ import annotations

import pytest

from engine_throughput import measure, random_engine, report, seconds_to_write
from rwkv_jax.config import ModelConfig


def test_the_table_says_whether_throughput_rises() -> None:
    lines = report({1: [10.0, 12.0, 11.0], 4: [30.0, 33.0, 1.0]}).splitlines()
    assert lines[2] == "| 1 | **11** (10 - 12) | 1.00 x | 90.9 |"
    assert lines[3] == "| 4 | **30** (1 - 33) | 2.73 x | 133.3 |"
    assert lines[-1].endswith("yes")
    assert report({1: [10.0], 4: [9.0], 16: [20.0]}).endswith("NO")


@pytest.mark.long
def test_every_number_of_texts_is_measured_in_turn() -> None:
    engine = random_engine(ModelConfig(vocab_size=11, num_layers=2, width=64), [1, 3], None)
    assert seconds_to_write(engine, 3, num_tokens=8) > 0
    found = measure(engine, [1, 3], num_tokens=8, repetitions=2)
    assert {batch_size: len(rates) for batch_size, rates in found.items()} == {1: 2, 3: 2}
