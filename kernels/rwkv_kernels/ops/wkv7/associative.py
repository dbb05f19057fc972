"""WKV-7 with all chunks in parallel: a prefix scan over their affine maps of the state gives the initial states.

A map's transition is an N x N matrix, so this takes about three times the work of `chunked`, in log2(T / C) sequential
steps instead of T / C: for long sequences with few rows and heads.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.ops.wkv7.chunked import wkv7_chunked
from rwkv_kernels.precision import Precision
from rwkv_kernels.xla import state_passing

CHUNK_SIZE = 32
"""Default steps in a chunk."""


def wkv7_associative(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array,
    *,
    segments: Array | None = None,
    precision: Precision = "full",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence, its chunks in parallel.

    Arguments and results are those of `wkv7_chunked`.
    """
    time = r.shape[1]
    chunks = state_passing.split_chunks((r, log_w, k, v, a, b), segments, chunk_size, state.dtype)
    (r, log_w, k, v, a, b), segments, count = chunks

    def run(v: Array, state: Array) -> tuple[Array, Array]:
        return wkv7_chunked(r, log_w, k, v, a, b, state, segments=segments, precision=precision, chunk_size=chunk_size)

    empty = jnp.zeros((r.shape[0], *state.shape[1:]), state.dtype)
    maps = state_passing.matrix_map(run, v, empty)
    initial, final = state_passing.chunk_initial_states(state_passing.MATRIX, maps, state, count)
    y, _ = run(v, initial)
    return state_passing.merge_chunks(y, count, time), final
