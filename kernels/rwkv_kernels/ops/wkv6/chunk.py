"""One chunk of WKV-6, for XLA and for kernels."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import chunking
from rwkv_kernels.chunking import ChunkFunction
from rwkv_kernels.decayed_attention import AttentionChunk, decayed_attention_chunk
from rwkv_kernels.matmul import Matmul


def make_chunk(matmul: Matmul, attention: AttentionChunk = decayed_attention_chunk) -> ChunkFunction:
    """The chunk function of WKV-6 with these matmuls; over time r, log_w, k, v, per head u."""

    def chunk(
        state: Array,
        over_time: tuple[Array, ...],
        per_head: tuple[Array, ...],
        local_segments: Array | None,
        active: Array | None,
    ) -> tuple[Array, Array]:
        del active  # steps that do not count are zeros
        (r, log_w, k, v), (u,) = over_time, per_head
        packing = None if local_segments is None else chunking.packing(local_segments)
        return attention(matmul, state, r, log_w, k, v, u, packing)

    return chunk
