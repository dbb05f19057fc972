"""Converting a Transformer into RWKV-7, first stage of three: the run of python_stdlib_transformer.py is the teacher.

    rwkv train configs/python_stdlib_transformer.py
    rwkv train configs/convert_1_align.py
    rwkv train configs/convert_2_distill.py
    rwkv train configs/convert_3_lengthen.py

Seen on 2 CPU cores (an AMD EPYC) that other work shared: 2 minutes; all held-out text 3.902 nats a token, 1.932 bits a
byte, where the teacher has 3.671 and 1.817. Every layer has RWKV-7's time mixing in the place of attention, begins with
the teacher's projections, and is brought near the teacher's attention on the teacher's own hidden states; nothing else
is trained (docs/conversion.md). The recipe shows how it is done, and is no way to a better model: RWKV-7 from scratch
is ahead of this teacher.
"""

import dataclasses
from pathlib import Path

from rwkv_jax.cli import load_config
from rwkv_jax.config import DistillationConfig, OptimizerConfig, TrainConfig, student_of


def config() -> TrainConfig:
    teacher = load_config(Path(__file__).with_name("python_stdlib_transformer.py"))
    return dataclasses.replace(
        teacher,
        run_dir="runs/convert_1_align",
        model=student_of(teacher.model),
        data=dataclasses.replace(teacher.data, tokenizer=teacher.run_dir),
        distillation=DistillationConfig(teacher.run_dir, copy=True),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, weight_decay=0.0, warmup_steps=20),
        training=dataclasses.replace(teacher.training, objective="align", num_steps=150),
        evaluation=dataclasses.replace(teacher.evaluation, every=50),
        checkpoint=dataclasses.replace(teacher.checkpoint, every=50, keep=1),
    )
