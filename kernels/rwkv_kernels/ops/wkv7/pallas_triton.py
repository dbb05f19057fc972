"""WKV-7 on NVIDIA GPUs, by Pallas through Triton."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import pallas_chunks
from rwkv_kernels.ops.wkv7.chunk import make_chunk
from rwkv_kernels.precision import Precision
from rwkv_kernels.products import Products

KERNEL = pallas_chunks.Kernel("wkv7", make_chunk, chunk_size=16, num_warps=8, num_warps_backward=8)
"""Shipped settings; docs/kernels.md has the registers and spills of others."""


def wkv7_pallas_triton(
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
    interpret: bool = False,
    kernel: pallas_chunks.Kernel = KERNEL,
    with_products: Products | None = None,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence, forward and backward each one kernel.

    Args:
      r, log_w, k, a, b: [B, T, H, N]; v: [B, T, H, M]; any floating dtype but float64.
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
        pallas_chunks.TRITON,
        kernel,
        (r, log_w, k, v, a, b),
        (),
        state,
        segments=segments,
        lengths=None,
        fixed_decay=False,
        precision=precision,
        interpret=interpret,
        with_products=with_products,
    )
