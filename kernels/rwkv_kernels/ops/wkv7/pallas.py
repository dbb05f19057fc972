"""WKV-7 as Pallas kernels, forward and backward one each or with chunks apart; docs/kernels.md has the resources."""

from __future__ import annotations

from rwkv_kernels.ops.wkv7 import pallas_split
from rwkv_kernels.ops.wkv7.chunk import make_chunk, make_chunk_with_inverse
from rwkv_kernels.ops.wkv7.chunk_gradients import chunk_gradients
from rwkv_kernels.pallas import mosaic_tpu, triton
from rwkv_kernels.pallas.driver import ChunkDerivative, Kernel, implementation

TRITON = Kernel("wkv7", make_chunk, chunk_size=16, values=3, decays=1, num_warps=8, num_warps_backward=8)
TRITON_SPLIT = Kernel(
    "wkv7_split",
    make_chunk,
    chunk_size=32,
    values=3,
    decays=1,
    num_warps=8,
    num_warps_backward=8,
    forward=pallas_split.forward,
    backward=pallas_split.backward,
)
MOSAIC_TPU = Kernel("wkv7", make_chunk, chunk_size=64, values=3, decays=1)
"""Chunks of 64: the longest whose half stays in float32's range at RWKV-7's fastest decays."""
MOSAIC_TPU_SPLIT = Kernel(
    "wkv7_split",
    make_chunk,
    chunk_size=64,
    values=3,
    decays=1,
    derivative=ChunkDerivative(make_chunk_with_inverse, chunk_gradients),
)

wkv7_pallas_triton = implementation(triton.BACKEND, TRITON)
wkv7_pallas_triton_split = implementation(triton.BACKEND, TRITON_SPLIT)
wkv7_pallas_mosaic_tpu = implementation(mosaic_tpu.BACKEND, MOSAIC_TPU)
wkv7_pallas_mosaic_tpu_split = implementation(mosaic_tpu.BACKEND, MOSAIC_TPU_SPLIT)
