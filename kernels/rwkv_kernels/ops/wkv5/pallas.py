"""WKV-5 as Pallas kernels, forward and backward one each; docs/kernels.md has the resources of other settings."""

from __future__ import annotations

from rwkv_kernels import pallas_chunks
from rwkv_kernels.ops.wkv5.chunk import make_chunk

TRITON = pallas_chunks.Kernel("wkv5", make_chunk, chunk_size=16, num_warps=8, num_warps_backward=8, fixed_decay=True)
MOSAIC_TPU = pallas_chunks.Kernel("wkv5", make_chunk, chunk_size=64, fixed_decay=True)

wkv5_pallas_triton = pallas_chunks.implementation(pallas_chunks.TRITON, TRITON)
wkv5_pallas_mosaic_tpu = pallas_chunks.implementation(pallas_chunks.MOSAIC_TPU, MOSAIC_TPU)
