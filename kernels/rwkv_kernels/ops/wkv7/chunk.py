"""One chunk of WKV-7 for kernels: the equations of chunked.py on [C, N] tiles, without slices or concatenations.

`chunked.py` stacks a~ on r~ and b~ on k~ for fewer and larger products, and has a hand-written derivative; both are for
XLA's CPU backend. Kernels can neither concatenate nor slice tiles, and gain nothing from it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import chunks
from rwkv_kernels.chunks import ChunkFunction
from rwkv_kernels.gauge import middle_gauge, nan_out_of_range
from rwkv_kernels.products import Products, without_rules


def _inverse_of_identity_minus(products: Products, triangle: Array) -> Array:
    """(I - M)^{-1} for a strictly triangular M [C, C], by doubling the size of inverted diagonal blocks."""

    def by_doubling(triangle: Array) -> Array:
        size = triangle.shape[-1]
        row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
        column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
        result = jnp.where(row == column, 1.0, jnp.where(row ^ column == 1, triangle, 0))  # blocks of two
        for level in range(1, size.bit_length() - 1):
            joins = jnp.where((row ^ column) >> level == 1, triangle, 0)
            result = result + products.nn(products.nn(result, joins), result)
        return result

    def derivative(result: Array, dresult: Array) -> Array:
        return products.tn(result, products.nt(dresult, result))

    def forward(triangle: Array) -> tuple[Array, Array]:
        result = without_rules(by_doubling)(triangle)
        return result, result

    def backward(result: Array, dresult: Array) -> tuple[Array]:
        return (without_rules(derivative)(result, dresult),)

    inverse = jax.custom_vjp(by_doubling)
    inverse.defvjp(forward, backward)
    return inverse(triangle)


def make_chunk(products: Products) -> ChunkFunction:
    """The chunk function of WKV-7 with these matmuls; over time r, log_w, k, v, a, b."""
    return functools.partial(_chunk, products)


def _chunk(
    products: Products,
    state: Array,
    over_time: tuple[Array, ...],
    per_head: tuple[Array, ...],
    within: Array | None,
    active: Array | None,
) -> tuple[Array, Array]:
    """State [M, N], vectors [C, N] and [C, M], segment numbers [C, 1] or None -> (next state, y [C, M])."""
    del per_head, active  # WKV-7 has no parameters per head; steps that do not count are zeros
    r, log_w, k, v, a, b = over_time
    size = r.shape[-2]
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    packing = None if within is None else chunks.packing(within)
    gauge = middle_gauge(products, log_w, packing)
    gauged = state * jnp.exp(gauge.entering + nan_out_of_range(gauge))

    up, down = jnp.exp(gauge.from_middle), jnp.exp(-gauge.from_middle)
    a, r, b, k = a * jnp.exp(gauge.from_middle - log_w), r * up, b * down, k * down
    earlier, own = column < row, column <= row
    kept_b, kept_k = b, k
    read_a, read_r = products.nt(a, gauged), products.nt(r, gauged)
    if packing is not None:
        earlier, own = earlier & packing.same, own & packing.same
        read_a, read_r = jnp.where(packing.reads, read_a, 0), jnp.where(packing.reads, read_r, 0)
        kept_b, kept_k = jnp.where(packing.writes, b, 0), jnp.where(packing.writes, k, 0)
        gauged = jnp.where(packing.keeps, gauged, 0)

    wanted = read_a + products.nn(jnp.where(earlier, products.nt(a, k), 0), v)
    inverse = _inverse_of_identity_minus(products, jnp.where(earlier, products.nt(a, b), 0))
    removed = products.nn(inverse, wanted)
    y = read_r + products.nn(jnp.where(own, products.nt(r, b), 0), removed)
    y = y + products.nn(jnp.where(own, products.nt(r, k), 0), v)
    return (gauged + products.tn(removed, kept_b) + products.tn(v, kept_k)) * jnp.exp(gauge.leaving), y
