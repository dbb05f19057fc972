"""RWKV-6 1.6B (24 x 2048), planned for sixteen H100s.

    rwkv train configs/rwkv6_1_6b.py --data.source PATH
    rwkv plan configs/rwkv6_1_6b.py --topology h100:2x8

`rwkv plan` said: h100:2x8, data 2 x fsdp 8: fits; arguments 2.24 GiB, peak 37.77 GiB of 79.14 GiB a device;
at best 1,227,861 tokens/s, MFU 69% while decays are weak; predicted 2953 ms a step, 2042 by pallas_triton,
2148 by pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv6_1_6b", fsdp=8)
