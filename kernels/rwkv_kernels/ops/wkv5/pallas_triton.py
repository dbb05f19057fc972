"""WKV-5 on NVIDIA GPUs, by Pallas through Triton."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import pallas_chunks
from rwkv_kernels.ops.wkv5.chunk import make_chunk
from rwkv_kernels.precision import Precision
from rwkv_kernels.products import Products

KERNEL = pallas_chunks.Kernel("wkv5", make_chunk, chunk_size=16, num_warps=8, num_warps_backward=8)
"""Shipped settings; docs/kernels.md has the registers and spills of others."""


def wkv5_pallas_triton(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    state: Array,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
    precision: Precision = "full",
    interpret: bool = False,
    kernel: pallas_chunks.Kernel = KERNEL,
    with_products: Products | None = None,
) -> tuple[Array, Array]:
    """WKV-5 over a sequence, forward and backward each one kernel.

    Args:
      r, k: [B, T, H, N]; v: [B, T, H, M]; log_w, u: [H, N]; any floating dtype but float64.
      state: float32 [B, H, M, N].
      segments: int32 [B, T] from `arguments.number_segments`, or None.
      lengths: int32 [B] or None; r, k and v are zero beyond them.
      precision: of matrix products.
      interpret: Pallas' interpret mode: on any machine, slowly, for tests.
      kernel: chunk size and warps.
      with_products: replaces the precision's matmuls, to measure their cost.

    Returns:
      y [B, T, H, M] and the final state, float32.
    """
    return pallas_chunks.run(
        pallas_chunks.TRITON,
        kernel,
        (r, k, v),
        (log_w, u),
        state,
        segments=segments,
        lengths=lengths,
        fixed_decay=True,
        precision=precision,
        interpret=interpret,
        with_products=with_products,
    )
