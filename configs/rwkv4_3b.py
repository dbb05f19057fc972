"""RWKV-4 3B (32 x 2560), planned for 32 H100s.

    rwkv train configs/rwkv4_3b.py --data.source PATH
    rwkv plan configs/rwkv4_3b.py --topology h100:4x8

`rwkv plan` said: h100:4x8, data 4 x fsdp 8: fits; arguments 4.18 GiB, peak 24.97 GiB of 79.14 GiB a device;
at best 1,847,944 tokens/s, MFU 100% (of arithmetic alone); predicted 1104 ms a step, 321 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_3b", fsdp=8)
