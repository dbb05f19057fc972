"""RWKV-4 1.5B (24 x 2048), planned for sixteen H100s.

    rwkv train configs/rwkv4_1_5b.py --data.source PATH
    rwkv plan configs/rwkv4_1_5b.py --topology h100:2x8

`rwkv plan` said: h100:2x8, data 2 x fsdp 8: fits; arguments 2.12 GiB, peak 25.50 GiB of 79.14 GiB a device;
at best 1,868,707 tokens/s, MFU 100% (of arithmetic alone); predicted 862 ms a step, 275 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_1_5b", fsdp=8)
