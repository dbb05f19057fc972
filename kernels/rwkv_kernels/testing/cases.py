"""Problem sizes and inputs shared by the test cases of all operators; numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NEAR_ONE = -1e-4
"""A log w with a time constant of ten thousand tokens."""

FAST = -50.0
"""A log w that leaves nothing after one token; e^{-log w} overflows float32 after two."""

MIXED = (-1e-6, -90.0)
"""Range of log w in one head: from a time constant of a million tokens to an underflow in one."""


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
"""T of 1, 15, 16 and 17, several chunks, and M unlike N; used by tests and by docs/errors.md."""


def rounded(inputs: dict[str, Floats]) -> dict[str, Floats]:
    """Inputs rounded to float32, as float64 arrays."""
    return {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}


class AttentionCase(NamedTuple):
    """Settings of a test case of WKV-5 or WKV-6."""

    log_w: float | None = None
    """One value for all; None draws values like a trained model's."""
    mixed: bool = False
    """Instead, values spread over `MIXED`."""
    one_per_head: bool = False
    """WKV-5 only: log_w and u are [H, 1]."""
    aligned: bool = False
    """Keys and receptances of a head point in almost one direction, so that writes add up and are read in full."""
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
"""Test cases of both WKV-5 and WKV-6, by name."""


def attention_inputs(
    case: AttentionCase, shape: Shape, rng: np.random.Generator, drawn_log_w: Floats
) -> dict[str, Floats]:
    """Arguments of `wkv5` or `wkv6`, by name, rounded to float32.

    Args:
      drawn_log_w: log_w like a trained model's, in its final shape.
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
