"""RWKV-7 0.1B (12 x 768), planned for eight H100s.

    rwkv train configs/rwkv7_0_1b.py --data.source PATH
    rwkv plan configs/rwkv7_0_1b.py --topology h100:1x8

`rwkv plan` said: h100:1x8, data 8: fits; arguments 2.14 GiB, peak 50.14 GiB of 79.14 GiB a device; at best
5,219,490 tokens/s, MFU 57%; predicted 837 ms a step, 420 by pallas_triton, 445 by pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv7_0_1b", fsdp=1)
