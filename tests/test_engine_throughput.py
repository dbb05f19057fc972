"""benchmarks/engine_throughput.py: whether its table tells the truth, and its engine has what is measured."""

from __future__ import annotations

from engine_throughput import random_engine, report
from rwkv_jax.bench.measure import Timing
from rwkv_jax.config import ModelConfig


def test_the_table_says_whether_throughput_rises() -> None:
    lines = report({1: Timing((0.1, 0.08, 0.125)), 4: Timing((0.16, 0.125, 4.0))}).splitlines()
    assert lines[2] == "| 1 | **10** (8 - 12) | 1.00 x | 100.0 |"
    assert lines[3] == "| 4 | **25** (1 - 32) | 2.50 x | 160.0 |"
    assert lines[-1].endswith("yes")
    assert report({1: Timing((0.1,)), 4: Timing((0.5,)), 16: Timing((0.8,))}).endswith("NO")


def test_the_engine_has_a_program_for_each_number_of_texts() -> None:
    engine = random_engine(ModelConfig(vocab_size=11, num_layers=2, width=64), [1, 3], None)
    assert (engine.options.num_slots, engine.options.sizes) == (3, (1, 3))
