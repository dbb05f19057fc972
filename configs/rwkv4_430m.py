"""RWKV-4 430M (24 x 1024), planned for eight H100s.

    rwkv train configs/rwkv4_430m.py --data.source PATH
    rwkv plan configs/rwkv4_430m.py --topology h100:1x8

`rwkv plan` said: h100:1x8, data 8: fits; arguments 4.81 GiB, peak 28.17 GiB of 79.14 GiB a device; at best
3,482,698 tokens/s, MFU 100% (of arithmetic alone); predicted 769 ms a step, 182 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_430m", fsdp=1)
