"""WKV-6 on TPUs, by Pallas through Mosaic."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import pallas_chunks
from rwkv_kernels.ops.wkv6.chunk import make_chunk
from rwkv_kernels.precision import Precision
from rwkv_kernels.products import Products

KERNEL = pallas_chunks.Kernel("wkv6", make_chunk, chunk_size=64)
"""Shipped settings; docs/kernels.md has their resources."""


def wkv6_pallas_mosaic_tpu(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    state: Array,
    *,
    segments: Array | None = None,
    precision: Precision = "full",
    interpret: bool = False,
    kernel: pallas_chunks.Kernel = KERNEL,
    with_products: Products | None = None,
) -> tuple[Array, Array]:
    """WKV-6 over a sequence, forward and backward each one kernel.

    Args:
      r, log_w, k: [B, T, H, N]; v: [B, T, H, M]; u: [H, N]; any floating dtype but float64.
      state: float32 [B, H, M, N].
      segments: int32 [B, T] from `arguments.number_segments`, or None.
      precision: of matrix products.
      interpret: Pallas' interpret mode: on any machine, slowly, for tests.
      kernel: chunk size and warps.
      with_products: replaces the precision's matmuls, to measure their cost.

    Returns:
      y [B, T, H, M] and the final state, float32.
    """
    return pallas_chunks.run(
        pallas_chunks.MOSAIC_TPU,
        kernel,
        (r, log_w, k, v),
        (u,),
        state,
        segments=segments,
        lengths=None,
        fixed_decay=False,
        precision=precision,
        interpret=interpret,
        with_products=with_products,
    )
