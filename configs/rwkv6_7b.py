"""RWKV-6 7B (32 x 4096), planned for 64 H100s.

    rwkv train configs/rwkv6_7b.py --data.source PATH
    rwkv plan configs/rwkv6_7b.py --topology h100:8x8

`rwkv plan` said: h100:8x8, fsdp 64: fits; arguments 1.36 GiB, peak 32.74 GiB of 79.14 GiB a device; at best
1,017,531 tokens/s, MFU 71% while decays are weak; predicted 4118 ms a step, 3164 by pallas_triton, 3270 by
pallas_triton_split.
"""

from rwkv_jax.config import TrainConfig
from rwkv_jax.recipes import official_run


def config() -> TrainConfig:
    return official_run("rwkv6_7b", fsdp=64)
