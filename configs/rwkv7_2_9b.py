"""RWKV-7 2.9B (32 x 2560), planned for 32 H100s.

    rwkv train configs/rwkv7_2_9b.py --data.source PATH
    rwkv plan configs/rwkv7_2_9b.py --topology h100:4x8

`rwkv plan` said: h100:4x8, data 4 x fsdp 8: fits; arguments 4.13 GiB, peak 24.65 GiB of 79.14 GiB a device;
at best 1,184,594 tokens/s, MFU 63%; predicted 2681 ms a step, 1309 by pallas_triton, 1408 by
pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_2_9b", fsdp=8)
