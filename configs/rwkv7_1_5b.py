"""RWKV-7 1.5B (24 x 2048), planned for sixteen H100s.

    rwkv train configs/rwkv7_1_5b.py --data.source PATH
    rwkv plan configs/rwkv7_1_5b.py --topology h100:2x8

`rwkv plan` said: h100:2x8, data 2 x fsdp 8: fits; arguments 2.14 GiB, peak 39.77 GiB of 79.14 GiB a device;
at best 1,132,996 tokens/s, MFU 60%; predicted 3769 ms a step, 1851 by pallas_triton, 2015 by
pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_1_5b", fsdp=8)
