"""RWKV-7 0.4B (24 x 1024), planned for eight H100s.

    rwkv train configs/rwkv7_0_4b.py --data.source PATH
    rwkv plan configs/rwkv7_0_4b.py --topology h100:1x8

`rwkv plan` said: h100:1x8, data 8: fits; arguments 5.04 GiB, peak 28.21 GiB of 79.14 GiB a device; at best
1,689,863 tokens/s, MFU 50%; predicted 2365 ms a step, 989 by pallas_triton, 1100 by pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_0_4b", fsdp=1)
