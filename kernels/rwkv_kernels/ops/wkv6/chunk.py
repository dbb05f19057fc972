"""One chunk of WKV-6, for XLA and for kernels."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import chunks
from rwkv_kernels.chunks import ChunkFunction
from rwkv_kernels.decayed_attention import AttentionChunk, decayed_attention_chunk
from rwkv_kernels.products import Products


def make_chunk(products: Products, attention: AttentionChunk = decayed_attention_chunk) -> ChunkFunction:
    """The chunk function of WKV-6 with these matmuls; over time r, log_w, k, v, per head u."""

    def chunk(
        state: Array,
        over_time: tuple[Array, ...],
        per_head: tuple[Array, ...],
        within: Array | None,
        active: Array | None,
    ) -> tuple[Array, Array]:
        del active  # steps that do not count are zeros
        (r, log_w, k, v), (u,) = over_time, per_head
        packing = None if within is None else chunks.packing(within)
        return attention(products, state, r, log_w, k, v, u, packing)

    return chunk
