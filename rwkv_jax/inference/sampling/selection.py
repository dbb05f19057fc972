"""Selection among V tokens in a few passes, without sorting: thresholds, maximum, random draws."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

_BLOCK = 256
"""Tokens per block; a draw chooses a block first."""


def largest_floor(
    mass_above: Callable[[Array], Array],
    target: Array,
    smallest: float,
    largest: Array | float,
    min_mass: Callable[[Array], Array | float],
) -> Array:
    """The largest floor, float32 [B], with enough mass at or above it; `smallest` if there is none.

    Exact, by bisection over the bit patterns of float32: at most 32 passes over the tokens, while sorting takes XLA's
    CPU backend a hundred times as long as one pass. It ends when at most one token is between the bounds.

    Args:
      mass_above: from floors [B, 1] to the mass [B] of the tokens that are not below; falls as floors rise.
      target: [B], the required mass.
      smallest: lower bound of all tokens' values.
      largest: upper bound, [B] or one for all rows.
      min_mass: maps a floor [B] to the minimum mass of a token not below it.
    """

    def middle_of(low: Array, high: Array) -> Array:
        return (low & high) + ((low ^ high) >> 1)  # the sum of the two could overflow

    def is_open(low: Array, high: Array, low_mass: Array, high_mass: Array) -> Array:
        several = low_mass - high_mass > 1.5 * min_mass(_from_order(low))
        return (middle_of(low, high) > low) & several

    def halve(bounds: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, low_mass, high_mass = bounds
        middle = middle_of(low, high)
        mass = mass_above(_from_order(middle)[:, None])
        is_enough = mass >= target
        halved = (
            jnp.where(is_enough, middle, low),
            jnp.where(is_enough, high, middle),
            jnp.where(is_enough, mass, low_mass),
            jnp.where(is_enough, high_mass, mass),
        )
        still_open = is_open(*bounds)
        return tuple(jnp.where(still_open, new, old) for new, old in zip(halved, bounds, strict=True))

    def each(value: Array | float) -> Array:
        return jnp.broadcast_to(jnp.float32(value), target.shape)

    low, high = _to_order(each(smallest)), _to_order(each(largest)) + 1
    bounds = (low, high, each(jnp.inf), each(0))
    low, *_ = jax.lax.while_loop(lambda bounds: jnp.any(is_open(*bounds)), halve, bounds)
    return _from_order(low)


def _to_order(value: Array) -> Array:
    """Maps float32 to int32 with the same order."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_order(order: Array) -> Array:
    """Inverse of the order-preserving map to int32."""
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)


def first_largest(values: Array) -> Array:
    """int32 [B]: argmax, vectorized on CPUs, where XLA's is not."""
    size = values.shape[-1]
    is_largest = values == jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(size, dtype=jnp.int32), size - 1), axis=-1)


def draw(weights: Array, keys: Array) -> Array:
    """Draws tokens, int32 [B], in proportion to weights [B, V]: first a block of tokens, then one in it.

    Needs two random numbers per row, while the Gumbel trick needs V; unlikely tokens are drawn as precisely as others.
    """
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    size = weights.shape[-1]
    blocks = rearrange(jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))), "B (block N) -> B block N", N=_BLOCK)
    block = _draw_by_sums(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _draw_by_sums(within, uniform[:, 1])


def _draw_by_sums(weights: Array, uniform: Array) -> Array:
    """int32 [B]: the first index at which cumulative weights [B, N] exceed a uniform share; never one of weight 0."""
    # Due to rounding, cumulative sums may decrease, or increase at zero weights.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    exceeds = sums > uniform[:, None] * jnp.max(sums, axis=-1, keepdims=True)
    return jnp.argmax(exceeds, axis=-1).astype(jnp.int32)
