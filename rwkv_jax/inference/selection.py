"""Selecting among V tokens in a few passes over them, without sorting: thresholds, the largest, and random draws."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

_BLOCK = 256
"""Tokens whose weights are added up before one of them is drawn."""


def largest_floor(
    mass_above: Callable[[Array], Array],
    target: Array,
    smallest: float,
    largest: Array | float,
    min_mass: Callable[[Array], Array | float],
) -> Array:
    """The largest floor, float32 [B], above which there is still enough mass; `smallest` where there never is.

    Found exactly, by bisection over the bit patterns of float32: at most 32 passes over the tokens, where sorting them
    takes XLA's CPU a hundred times as long as one. It ends once there is one token, or none, between the bounds.

    Args:
      mass_above: from floors [B, 1] to the mass [B] of the tokens that are not below; falls as floors rise.
      target: [B], the mass that is enough.
      smallest: the values of all tokens are at least this.
      largest: and at most this, [B] or one for all rows.
      min_mass: from a floor [B] to the least mass that a token not below it can have.
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
    """int32 in the order of float32."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_order(order: Array) -> Array:
    """The float32 that has this place in the order."""
    return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)


def first_largest(values: Array) -> Array:
    """int32 [B]: argmax, which XLA does not vectorize on a CPU."""
    size = values.shape[-1]
    is_largest = values == jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(size, dtype=jnp.int32), size - 1), axis=-1)


def draw(weights: Array, keys: Array) -> Array:
    """int32 [B], each token as often as its part of the weights [B, V]: first a block of tokens, then one of its own.

    Two random numbers a row serve, where the Gumbel trick needs V; and unlikely tokens are drawn as finely as others.
    """
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    size = weights.shape[-1]
    blocks = rearrange(jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))), "B (block N) -> B block N", N=_BLOCK)
    block = _draw_by_sums(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _draw_by_sums(within, uniform[:, 1])


def _draw_by_sums(weights: Array, uniform: Array) -> Array:
    """int32 [B]: the first index at which the weights [B, N] so far exceed a uniform part of all; never one without."""
    # Rounding may let the sums fall, and rise where nothing is added.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    exceeds = sums > uniform[:, None] * jnp.max(sums, axis=-1, keepdims=True)
    return jnp.argmax(exceeds, axis=-1).astype(jnp.int32)
