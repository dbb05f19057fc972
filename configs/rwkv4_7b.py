"""RWKV-4 7B (32 x 4096), planned for 64 H100s.

    rwkv train configs/rwkv4_7b.py --data.source PATH
    rwkv plan configs/rwkv4_7b.py --topology h100:8x8

`rwkv plan` said: h100:8x8, fsdp 64: fits; arguments 1.31 GiB, peak 18.69 GiB of 79.14 GiB a device; at best
1,468,625 tokens/s, MFU 100% (of arithmetic alone); predicted 1112 ms a step, 403 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_7b", fsdp=64)
