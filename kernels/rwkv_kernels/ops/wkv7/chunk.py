"""One chunk of WKV-7 for kernels: the equations of chunked.py on [C, N] tiles, without slices or concatenations.

`chunked.py` stacks a~ on r~ and b~ on k~ for fewer and larger products, and has a hand-written derivative; both are for
XLA's CPU backend. Kernels can neither concatenate nor slice tiles, and gain nothing from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import chunking
from rwkv_kernels.chunking import ChunkFunction
from rwkv_kernels.decay_scaling import cumulative_decay, nan_out_of_range
from rwkv_kernels.matmul import Matmul, inline_custom_rules


def inverse_by_doubling(product: Callable[[Array, Array], Array], triangle: Array) -> Array:
    """(I - M)^{-1} for a strictly triangular M [..., C, C], by doubling the size of inverted diagonal blocks."""
    size = triangle.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    result = jnp.where(row == column, 1.0, jnp.where(row ^ column == 1, triangle, 0))  # blocks of two
    for level in range(1, size.bit_length() - 1):
        joins = jnp.where((row ^ column) >> level == 1, triangle, 0)
        result = result + product(product(result, joins), result)
    return result


def _inverse_of_identity_minus(matmul: Matmul, triangle: Array) -> Array:
    """`inverse_by_doubling` with a derivative of its own."""
    by_doubling = functools.partial(inverse_by_doubling, matmul.nn)

    def derivative(result: Array, dresult: Array) -> Array:
        return matmul.tn(result, matmul.nt(dresult, result))

    def forward(triangle: Array) -> tuple[Array, Array]:
        result = inline_custom_rules(by_doubling)(triangle)
        return result, result

    def backward(result: Array, dresult: Array) -> tuple[Array]:
        return (inline_custom_rules(derivative)(result, dresult),)

    inverse = jax.custom_vjp(by_doubling)
    inverse.defvjp(forward, backward)
    return inverse(triangle)


def make_chunk(matmul: Matmul) -> ChunkFunction:
    """The chunk function of WKV-7 with these matmuls; over time r, log_w, k, v, a, b."""
    return lambda *arguments: _chunk(matmul, *arguments)[:2]


def make_chunk_with_inverse(matmul: Matmul) -> Callable[..., tuple[Array, Array, Array]]:
    """The same, and (I - A_b)^{-1} [C, C] as a third result."""
    return functools.partial(_chunk, matmul)


def _chunk(
    matmul: Matmul,
    state: Array,
    over_time: tuple[Array, ...],
    per_head: tuple[Array, ...],
    local_segments: Array | None,
    active: Array | None,
) -> tuple[Array, Array, Array]:
    """State [M, N], vectors [C, N] and [C, M], local segments [C, 1] or None -> (next state, y [C, M], inverse)."""
    del per_head, active  # WKV-7 has no parameters per head; steps that do not count are zeros
    r, log_w, k, v, a, b = over_time
    size = r.shape[-2]
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    packing = None if local_segments is None else chunking.packing(local_segments)
    scaling = cumulative_decay(matmul, log_w, packing)
    out_of_range = nan_out_of_range(scaling, packing)
    scaled_state = state * jnp.exp(scaling.log_decay_in + out_of_range)
    # Not every segment of several reads the state.
    from_middle = scaling.from_middle if packing is None else scaling.from_middle + out_of_range

    up, down = jnp.exp(from_middle), jnp.exp(-from_middle)
    a, r, b, k = a * jnp.exp(from_middle - log_w), r * up, b * down, k * down
    earlier, own = column < row, column <= row
    kept_b, kept_k = b, k
    read_a, read_r = matmul.nt(a, scaled_state), matmul.nt(r, scaled_state, "z")
    if packing is not None:
        earlier, own = earlier & packing.same, own & packing.same
        read_a, read_r = jnp.where(packing.reads, read_a, 0), jnp.where(packing.reads, read_r, 0)
        kept_b, kept_k = jnp.where(packing.writes, b, 0), jnp.where(packing.writes, k, 0)
        scaled_state = jnp.where(packing.keeps, scaled_state, 0)

    wanted = read_a + matmul.nn(jnp.where(earlier, matmul.nt(a, k), 0), v, "y")
    inverse = _inverse_of_identity_minus(matmul, jnp.where(earlier, matmul.nt(a, b), 0))
    removed = matmul.nn(inverse, wanted)
    y = read_r + matmul.nn(jnp.where(own, matmul.nt(r, b), 0), removed, "z")
    y = y + matmul.nn(jnp.where(own, matmul.nt(r, k), 0), v, "yz")
    written = matmul.tn(removed, kept_b) + matmul.tn(v, kept_k, "x")
    return (scaled_state + written) * jnp.exp(scaling.log_decay_out), y, inverse
