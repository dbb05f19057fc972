"""The run of python_stdlib.py with a Transformer of equal size: the same text, number of parameters, rows and steps.

    rwkv train configs/python_stdlib_transformer.py

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 8 minutes; all held-out text 3.671 nats a token, 1.817 bits a
byte, where RWKV-7 has 1.530 after as many steps and gzip -9 needs 1.887. One seed. The learning rate is a
quarter of RWKV-7's, with which the loss stood at 5.7 nats after 150 steps; no other was tried, and a longer run or a
search may well do better by the Transformer.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import TrainConfig


def config() -> TrainConfig:
    seven = load_config(Path(__file__).with_name("python_stdlib.py"))
    model = seven.model.transformer_of_equal_size()
    optimizer = dataclasses.replace(seven.optimizer, learning_rate=1e-3, final_learning_rate=5e-5)
    return dataclasses.replace(seven, run_dir="runs/python_stdlib_transformer", model=model, optimizer=optimizer)
