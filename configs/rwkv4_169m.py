"""RWKV-4 169M (12 x 768), planned for eight H100s.

    rwkv train configs/rwkv4_169m.py --data.source PATH
    rwkv plan configs/rwkv4_169m.py --topology h100:1x8

`rwkv plan` said: h100:1x8, data 8: fits; arguments 1.89 GiB, peak 11.52 GiB of 79.14 GiB a device; at best
10,094,844 tokens/s, MFU 100% (of arithmetic alone); predicted 367 ms a step, 71 by pallas_triton.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv4_169m", fsdp=1)
