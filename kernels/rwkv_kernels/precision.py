"""Precisions of matrix products."""

from __future__ import annotations

from typing import Literal, get_args

from jax import lax

Precision = Literal["full", "default", "fast"]
"""Precision of the matrix products inside an operator; sums, decays and states are always float32.

    full     as exact as float32: six passes of bfloat16
    default  three passes of bfloat16; TF32 in the XLA forms on NVIDIA
    fast     bfloat16

On NVIDIA a kernel multiplies by v and dy that are bfloat16 already in half of six passes, or two of three. A CPU has
float32 only, and uses it for all three. docs/errors.md has the error of each.
"""

XLA: dict[Precision, lax.Precision] = {
    "full": lax.Precision.HIGHEST,
    "default": lax.Precision.HIGH,
    "fast": lax.Precision.DEFAULT,
}
"""XLA's precision for each; on NVIDIA it has none below TF32 for float32 operands, so `fast` is `default` there."""


def check_precision(precision: str) -> None:
    """Checks that this is a `Precision`.

    Raises:
      ValueError: it is not.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(get_args(Precision))}")
