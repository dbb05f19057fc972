"""How fast text was written."""

from __future__ import annotations

import itertools

import pytest

from rwkv_jax.cli.speed import Speed


@pytest.mark.parametrize(
    ("num_first", "counts", "text"),
    [
        (4, [2, 2, 0, 3, 3], "10 tokens, 3.0 tokens/s; the first 4 took 2.00 s"),
        (4, [2, 2], "4 tokens in 2.00 s"),
        (4, [], "0 tokens in 0.00 s"),
        (None, [10], "10 tokens in 1.00 s"),
    ],
)
def test_tokens_after_the_first_ones_are_timed_apart(num_first: int | None, counts: list[int], text: str) -> None:
    seconds = itertools.count()
    speed = Speed(num_first, clock=lambda: float(next(seconds)))
    for count in counts:
        speed.count(count)
    assert str(speed) == f"{text} with the prompt and what had to be compiled"
