"""RWKV-7 7.2B (32 x 4096), planned for 64 H100s.

    rwkv train configs/rwkv7_7_2b.py --data.source PATH
    rwkv plan configs/rwkv7_7_2b.py --topology h100:8x8

`rwkv plan` said: h100:8x8, fsdp 64: fits; arguments 1.28 GiB, peak 17.81 GiB of 79.14 GiB a device; at best
1,037,805 tokens/s, MFU 69%; predicted 2636 ms a step, 1419 by pallas_triton, 1498 by pallas_triton_split.
v5p:4x4x4, fsdp 64: fits; arguments 1.28 GiB, peak 17.46 GiB of 95.00 GiB a device; at best 541,580 tokens/s,
MFU 77%; predicted 6228 ms a step.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_7_2b", fsdp=64)
