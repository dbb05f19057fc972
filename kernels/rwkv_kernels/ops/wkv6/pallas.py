"""WKV-6 as Pallas kernels, forward and backward one each or split in five; docs/kernels.md has the resources."""

from __future__ import annotations

from rwkv_kernels.ops.wkv6.chunk import make_chunk
from rwkv_kernels.pallas import decayed_attention_split, mosaic_tpu, triton
from rwkv_kernels.pallas.driver import Kernel, implementation

TRITON = Kernel("wkv6", make_chunk, chunk_size=16, values=3, decays=1, num_warps=8, num_warps_backward=8)
TRITON_SPLIT = Kernel(
    "wkv6_split",
    make_chunk,
    chunk_size=32,
    values=3,
    decays=1,
    num_warps=8,
    num_warps_backward=8,
    forward=decayed_attention_split.forward,
    backward=decayed_attention_split.backward,
)
MOSAIC_TPU = Kernel("wkv6", make_chunk, chunk_size=64, values=3, decays=1)

wkv6_pallas_triton = implementation(triton.BACKEND, TRITON)
wkv6_pallas_triton_split = implementation(triton.BACKEND, TRITON_SPLIT)
wkv6_pallas_mosaic_tpu = implementation(mosaic_tpu.BACKEND, MOSAIC_TPU)
