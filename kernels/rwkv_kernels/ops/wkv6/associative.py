"""WKV-6 with all chunks in parallel: a prefix scan over their affine maps of the state gives the initial states.

Twice the work of `chunked`, in log2(T / C) sequential steps instead of T / C: for long sequences, few rows and heads.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.ops.wkv6.chunked import wkv6_chunked
from rwkv_kernels.precision import Precision
from rwkv_kernels.xla import state_passing

CHUNK_SIZE = 32
"""Default steps in a chunk."""


def wkv6_associative(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    state: Array,
    *,
    segments: Array | None = None,
    precision: Precision = "full",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """WKV-6 over a sequence, its chunks in parallel; exact for any decay.

    Arguments and results are those of `wkv6_chunked`.
    """
    time = r.shape[1]
    (r, log_w, k, v), segments, count = state_passing.split_chunks((r, log_w, k, v), segments, chunk_size, state.dtype)

    def run(state: Array) -> tuple[Array, Array]:
        return wkv6_chunked(r, log_w, k, v, u, state, segments=segments, precision=precision, chunk_size=chunk_size)

    empty = jnp.zeros((r.shape[0], *state.shape[1:]), state.dtype)
    total = jnp.sum(log_w, axis=1)
    maps = state_passing.diagonal_map(run, total, empty, segments)
    initial, final = state_passing.chunk_initial_states(state_passing.DIAGONAL, maps, state, count)
    y, _ = run(initial)
    return state_passing.merge_chunks(y, count, time), final
