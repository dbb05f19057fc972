"""Scaling by cumulative decay around a chunk's middle row (a gauge), so that one matrix product gives decayed scores.

Let c_t be the cumulative sum of log w and m its value at the middle row. Vectors that read at step t are scaled by
e^{c_t - m} and vectors that write by e^{m - c_t}, so their product decays by all steps in between. Exponents reach half
a chunk of log w, so decays must be weak enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.chunks import Packing, masked, with_ndim
from rwkv_kernels.products import Products


class Gauge(NamedTuple):
    """Sums of log w relative to the middle row of a chunk."""

    from_middle: Array
    """[..., C, N]: c_t - m."""
    entering: Array
    """[..., 1, N]: m, for the incoming state."""
    leaving: Array
    """[..., 1, N]: c_C - m, for the outgoing state."""


def middle_gauge(products: Products, log_w: Array, packing: Packing | None) -> Gauge:
    """Sums of log w [..., C, N] from the middle row outwards, without differences of long sums.

    With several segments in a chunk, sums end at the borders of a row's segment: segments do not affect each other, not
    even by rounding.
    """
    size = log_w.shape[-2]
    middle = (size - 1) // 2
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    after = (column <= row) & (column > middle)
    before = (column > row) & (column <= middle)
    in_first_half = lax.broadcasted_iota(jnp.int32, (size, 1), 0) <= middle
    entering, leaving = in_first_half, ~in_first_half
    if packing is not None:
        after, before = (with_ndim(x, packing.same.ndim) & packing.same for x in (after, before))
        entering = with_ndim(entering, packing.reads.ndim) & packing.reads
        leaving = with_ndim(leaving, packing.writes.ndim) & packing.writes
    return Gauge(
        from_middle=products.sums(jnp.where(after, 1.0, 0.0) - jnp.where(before, 1.0, 0.0), log_w),
        entering=jnp.sum(masked(entering, log_w), axis=-2, keepdims=True),
        leaving=jnp.sum(masked(leaving, log_w), axis=-2, keepdims=True),
    )


def nan_out_of_range(gauge: Gauge) -> Array:
    """[..., 1, N]: 0, or NaN where a state of size 1 would silently lose digits to underflow."""
    limits = jnp.finfo(gauge.entering.dtype)
    in_range = jnp.minimum(gauge.entering, gauge.leaving) >= -math.log(limits.eps / limits.tiny)
    return jnp.where(in_range, 0, jnp.nan)
