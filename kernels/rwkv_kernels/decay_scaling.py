"""Scaling by cumulative decay from a chunk's middle row, so that one matrix product gives decayed scores.

Let c_t be the cumulative sum of log w and m its value at the middle row. Vectors that read at step t are scaled by
e^{c_t - m} and vectors that write by e^{m - c_t}, so their product decays by all steps in between. Exponents reach half
a chunk of log w, so decays must be mild enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.chunking import Packing, masked, with_ndim
from rwkv_kernels.matmul import Matmul


class DecayScaling(NamedTuple):
    """Sums of log w relative to the middle row of a chunk."""

    from_middle: Array
    """[..., C, N]: c_t - m."""
    log_decay_in: Array
    """[..., 1, N]: m, for the initial state."""
    log_decay_out: Array
    """[..., 1, N]: c_C - m, for the final state."""


def cumulative_decay(matmul: Matmul, log_w: Array, packing: Packing | None) -> DecayScaling:
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
    first, second = in_first_half, ~in_first_half
    if packing is not None:
        after, before = (with_ndim(x, packing.same.ndim) & packing.same for x in (after, before))
        first = with_ndim(first, packing.reads.ndim) & packing.reads
        second = with_ndim(second, packing.writes.ndim) & packing.writes
    return DecayScaling(
        from_middle=matmul.masked_sum(jnp.where(after, 1.0, 0.0) - jnp.where(before, 1.0, 0.0), log_w),
        log_decay_in=jnp.sum(masked(first, log_w), axis=-2, keepdims=True),
        log_decay_out=jnp.sum(masked(second, log_w), axis=-2, keepdims=True),
    )


def nan_out_of_range(scaling: DecayScaling, packing: Packing | None) -> Array:
    """[..., 1, N]: 0, or NaN where a state of size 1 would silently lose digits to underflow.

    With several segments in a chunk, in any of them. It is for all rows: products of rows would spread NaN anyway.
    """
    limits = jnp.finfo(scaling.log_decay_in.dtype)
    smallest = jnp.minimum(scaling.log_decay_in, scaling.log_decay_out)
    if packing is not None:  # the sums for the states are those of the first and of the last segment
        rows = jnp.abs(lax.stop_gradient(scaling.from_middle))
        smallest = jnp.minimum(smallest, -jnp.max(rows, axis=-2, keepdims=True))
    return jnp.where(smallest >= -math.log(limits.eps / limits.tiny), 0, jnp.nan)
