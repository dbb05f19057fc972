"""A model with half the layers learns what the run of `configs/python_stdlib.py` predicts, from initial values.

    rwkv train configs/python_stdlib.py        (or `make train`)
    rwkv train configs/distill_python_stdlib.py
    rwkv train configs/distill_python_stdlib.py --training.objective next_token --distillation.teacher None \\
        --run-dir runs/small_python_stdlib     (the same model without a teacher)

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 1.6 minutes; all held-out text 3.884 nats a token, 1.923 bits
a byte. Without a teacher it took 1.4 minutes and reached 4.154 nats, 2.056 bits a byte; the teacher has 1.530.

Why these values: the schedule and the rows are the teacher's run in a sixth of its steps; half of the loss is the
teacher's, half the text's. Nothing was searched.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import DistillationConfig, TrainConfig


def config() -> TrainConfig:
    teacher = load_config(Path(__file__).with_name("python_stdlib.py"))
    steps = teacher.training.num_steps // 6
    return dataclasses.replace(
        teacher,
        run_dir="runs/distill_python_stdlib",
        model=dataclasses.replace(teacher.model, num_layers=2),
        data=dataclasses.replace(teacher.data, tokenizer=teacher.run_dir),
        distillation=DistillationConfig(teacher.run_dir, kl_weight=0.5, ce_weight=0.5),
        training=dataclasses.replace(teacher.training, objective="distill", num_steps=steps),
        evaluation=dataclasses.replace(teacher.evaluation, every=steps // 2),
        checkpoint=dataclasses.replace(teacher.checkpoint, every=steps // 2, keep=1),
    )
