"""WKV-5 as Pallas kernels, forward and backward one each or split in five; docs/kernels.md has the resources."""

from __future__ import annotations

from rwkv_kernels.ops.wkv5.chunk import make_chunk
from rwkv_kernels.pallas import decayed_attention_split, mosaic_tpu, triton
from rwkv_kernels.pallas.driver import Kernel, implementation

TRITON = Kernel("wkv5", make_chunk, chunk_size=16, values=2, num_warps=8, num_warps_backward=8, fixed_decay=True)
TRITON_SPLIT = Kernel(
    "wkv5_split",
    make_chunk,
    chunk_size=32,
    values=2,
    num_warps=8,
    num_warps_backward=8,
    fixed_decay=True,
    forward=decayed_attention_split.forward,
    backward=decayed_attention_split.backward,
)
MOSAIC_TPU = Kernel("wkv5", make_chunk, chunk_size=64, values=2, fixed_decay=True)

wkv5_pallas_triton = implementation(triton.BACKEND, TRITON)
wkv5_pallas_triton_split = implementation(triton.BACKEND, TRITON_SPLIT)
wkv5_pallas_mosaic_tpu = implementation(mosaic_tpu.BACKEND, MOSAIC_TPU)
