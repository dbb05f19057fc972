"""RWKV-7 7.2B (32 x 4096), planned for 64 H100s.

    rwkv train configs/rwkv7_7_2b.py --data.source PATH
    rwkv plan configs/rwkv7_7_2b.py --topology h100:8x8

`rwkv plan` said: h100:8x8, fsdp 64: fits; arguments 1.28 GiB, peak 17.80 GiB of 79.14 GiB a device; at best
1,062,722 tokens/s, MFU 70%. Before its loss was fused, v5p:4x4x4, fsdp 64: fits; arguments 1.28 GiB,
peak 17.56 GiB of 95.00 GiB a device; at best 530,650 tokens/s, MFU 76%.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_7_2b", fsdp=64)
