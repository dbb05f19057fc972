"""The run of python_stdlib.py with RWKV-5: the same text, sizes, steps and learning rate.

    rwkv train configs/python_stdlib_rwkv5.py

Seen on 2 CPU cores with 800 steps, which other work shared: 7 minutes; all held-out text 3.191 nats a token,
1.579 bits a byte, where RWKV-7 had 1.563 after as many and xz -9 needs 1.557. One seed, and no setting was searched
for any of them.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import TrainConfig


def config() -> TrainConfig:
    seven = load_config(Path(__file__).with_name("python_stdlib.py"))
    model = dataclasses.replace(seven.model, generation="5.2")
    return dataclasses.replace(seven, run_dir="runs/python_stdlib_rwkv5", model=model)
