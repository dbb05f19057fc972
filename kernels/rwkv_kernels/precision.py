"""How exact matrix products are, where the hardware offers a choice."""

from __future__ import annotations

from typing import Literal, get_args

from jax import lax

Precision = Literal["full", "default", "fast"]
"""Arithmetic of the products inside an operator; sums, decays and states are float32 whatever it is.

    full     as exact as float32: bfloat16 six times
    default  TF32 (NVIDIA), bfloat16 three times (TPU)
    fast     bfloat16

A CPU has float32 only, and uses it for all three. docs/errors.md has the error of each.
"""

XLA: dict[Precision, lax.Precision] = {
    "full": lax.Precision.HIGHEST,
    "default": lax.Precision.HIGH,
    "fast": lax.Precision.DEFAULT,
}
"""What each means to XLA; on NVIDIA it has nothing below TF32 for float32 operands, so `fast` is `default` there."""


def check_precision(precision: str) -> None:
    """Refuses a word that is no precision.

    Raises:
      ValueError: naming it and the choices.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(get_args(Precision))}")
