"""RWKV-6 3B (32 x 2560), planned for 32 H100s.

    rwkv train configs/rwkv6_3b.py --data.source PATH
    rwkv plan configs/rwkv6_3b.py --topology h100:4x8

`rwkv plan` said: h100:4x8, data 4 x fsdp 8: fits; arguments 4.34 GiB, peak 19.02 GiB of 79.14 GiB a device;
at best 1,240,904 tokens/s, MFU 69% while decays are weak; predicted 1622 ms a step, 1037 by pallas_triton,
1081 by pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv6_3b", fsdp=8)
