"""How fast text was written."""

from __future__ import annotations

import itertools

import pytest

from rwkv_jax.cli.speed import Speed


@pytest.mark.parametrize(
    ("is_streamed", "counts", "text"),
    [
        (True, [1, 1, 0, 1, 1], "4 tokens, 1.0 tokens/s; the first took 1.00 s"),
        (True, [1], "1 tokens in 1.00 s"),
        (True, [], "0 tokens in 0.00 s"),
        (False, [10], "10 tokens in 1.00 s"),
    ],
)
def test_tokens_after_the_first_are_timed_apart(is_streamed: bool, counts: list[int], text: str) -> None:
    seconds = itertools.count()
    speed = Speed(is_streamed=is_streamed, clock=lambda: float(next(seconds)))
    for count in counts:
        speed.count(count)
    assert str(speed) == f"{text} with the prompt and what had to be compiled"
