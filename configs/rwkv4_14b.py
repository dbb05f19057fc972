"""RWKV-4 14B (40 x 5120), planned for 64 H100s.

    rwkv train configs/rwkv4_14b.py --data.source PATH
    rwkv plan configs/rwkv4_14b.py --topology h100:8x8

`rwkv plan` said: h100:8x8, fsdp 64: fits; arguments 2.50 GiB, peak 28.30 GiB of 79.14 GiB a device; at best
759,791 tokens/s, MFU 100% (of arithmetic alone); predicted 1728 ms a step, 749 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_14b", fsdp=64)
