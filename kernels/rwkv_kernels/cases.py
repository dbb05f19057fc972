"""What the cases of all operators share: sizes of problems, and inputs that float32 holds exactly; numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NEAR_ONE = -1e-4
"""A log w at which a state lives for ten thousand tokens."""

FAST = -50.0
"""A log w at which nothing is left after one token, and whose e^{-log w} overflows float32 after two."""

MIXED = (-1e-6, -90.0)
"""Log w of channels side by side: one keeps everything for a million tokens, another is below float32 at once."""


class Shape(NamedTuple):
    """Sizes of a problem; WKV-4 has heads * key_dim channels."""

    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES: tuple[Shape, ...] = (
    Shape(3, 1, 1, 5, 12),
    Shape(1, 15, 2, 16, 16),
    Shape(3, 16, 2, 8, 8),
    Shape(2, 17, 2, 24, 8),
    Shape(2, 70, 2, 8, 6),
    Shape(1, 257, 1, 64, 64),
    Shape(3, 257, 2, 7, 9),
    Shape(1, 1024, 2, 64, 64),
)
"""One token, one short of a block of 16, a block, one more; several chunks; value sizes that differ from key sizes.

Tests and the error table go through all of them.
"""


def rounded(inputs: dict[str, Floats]) -> dict[str, Floats]:
    """The same arguments as float64 arrays whose values float32 holds exactly."""
    return {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}


class AttentionCase(NamedTuple):
    """What is special about inputs of WKV-5 or WKV-6."""

    log_w: float | None = None
    """One decay for all; None draws them as a trained model has them."""
    mixed: bool = False
    """Decays over all of `MIXED`, instead."""
    one_per_head: bool = False
    """WKV-5 only: log_w and u are [H, 1]."""
    aligned: bool = False
    """Keys and readings of a head point almost one way, so that what was written adds up and is read whole."""
    state_scale: float = 1.0
    """Standard deviation of the initial state."""


ATTENTION_CASES: dict[str, AttentionCase] = {
    "realistic": AttentionCase(),
    "slow_decay": AttentionCase(log_w=NEAR_ONE),
    "aligned_keys_slow_decay": AttentionCase(log_w=NEAR_ONE, aligned=True),
    "fast_decay": AttentionCase(log_w=FAST),
    "mixed_decay": AttentionCase(mixed=True),
    "large_state": AttentionCase(state_scale=1e3),
}
"""Cases that WKV-5 and WKV-6 have in common, by name."""


def attention_inputs(
    case: AttentionCase, shape: Shape, rng: np.random.Generator, drawn_log_w: Floats
) -> dict[str, Floats]:
    """Arguments of `wkv5` or `wkv6`, by name, rounded to float32.

    Args:
      rng: where random numbers come from.
      drawn_log_w: log_w as a trained model has it, of the shape that log_w is to have.
    """
    batch, time, heads, key_dim, value_dim = shape
    keys = (batch, time, heads, key_dim)
    log_w = drawn_log_w if case.log_w is None else np.full_like(drawn_log_w, case.log_w)
    if case.mixed:
        spread = -np.geomspace(-MIXED[0], -MIXED[1], log_w.size)
        log_w = rng.permutation(spread).reshape(log_w.shape)
    r, k = rng.standard_normal(keys), rng.standard_normal(keys)
    if case.aligned:
        direction = rng.standard_normal((batch, 1, heads, key_dim))
        r, k = direction + 1e-3 * r, direction + 1e-3 * k
    inputs = {
        "r": r,
        "log_w": log_w,
        "k": k,
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "u": rng.standard_normal((heads, 1 if case.one_per_head else key_dim)),
        "state": case.state_scale * rng.standard_normal((batch, heads, value_dim, key_dim)),
    }
    return rounded(inputs)
