"""One chunk of WKV-5, for XLA and for kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rwkv_kernels import chunking
from rwkv_kernels.chunking import ChunkFunction
from rwkv_kernels.decayed_attention import AttentionChunk, decayed_attention_chunk
from rwkv_kernels.matmul import Matmul


def make_chunk(matmul: Matmul, attention: AttentionChunk = decayed_attention_chunk) -> ChunkFunction:
    """The chunk function of WKV-5 with these matmuls; over time r, k, v, per head log_w, u.

    The decay enters as [H, C, N], which no row of the batch pays for, and its gradient is summed over rows and steps.
    """

    def chunk(
        state: Array,
        over_time: tuple[Array, ...],
        per_head: tuple[Array, ...],
        local_segments: Array | None,
        active: Array | None,
    ) -> tuple[Array, Array]:
        (r, k, v), (log_w, u) = over_time, per_head
        log_w = jnp.broadcast_to(log_w, (*log_w.shape[:-2], *r.shape[-2:]))
        if active is not None:  # steps that do not count do not decay
            log_w = log_w * active.astype(log_w.dtype)
        packing = None if local_segments is None else chunking.packing(local_segments)
        return attention(matmul, state, r, log_w, k, v, u, packing)

    return chunk
