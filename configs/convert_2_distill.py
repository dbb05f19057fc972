"""Converting a Transformer into RWKV-7, second stage: the aligned student learns what the teacher predicts.

    rwkv train configs/convert_2_distill.py        (after configs/convert_1_align.py, which names the stages)

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 4 minutes; all held-out text 3.715 nats a token, 1.839 bits a
byte (1.932 before this stage, the teacher 1.817).
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import DistillationConfig, TrainConfig


def config() -> TrainConfig:
    aligned = load_config(Path(__file__).with_name("convert_1_align.py"))
    return dataclasses.replace(
        aligned,
        run_dir="runs/convert_2_distill",
        seed=aligned.seed + 1,  # other rows than those of the stage before
        initial_weights=aligned.run_dir,
        distillation=DistillationConfig(aligned.distillation.teacher),
        training=dataclasses.replace(aligned.training, objective="distill", num_steps=300),
    )
