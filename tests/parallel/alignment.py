"""Run with eight fake devices: prints, as JSON, how far a step of alignment on a mesh is from one device's."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from unittest import mock

import jax
import numpy as np

from rwkv_jax.config import DistillationConfig, ModelConfig, StepConfig, TrainConfig, student_of
from rwkv_jax.training import teacher
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.step import loss_and_gradients
from tests.golden import QUICK, relative_error
from tests.models.parameters import random_params
from tests.parallel.meshes import make_mesh

TEACHER = ModelConfig(
    architecture="transformer", vocab_size=48, num_layers=3, width=32, head_dim=4, ffn_width=64, dtype="float64"
)
STUDENT = dataclasses.replace(student_of(TEACHER, (0, 2)), decay_rank=8, gate_rank=8)


def results_on(mesh: jax.sharding.Mesh | None) -> Any:
    """Loss, metrics and gradients of a batch."""
    config = TrainConfig(
        model=STUDENT,
        training=StepConfig(objective="align", batch_size=8, sequence_length=16, accumulation_steps=2),
        distillation=DistillationConfig("teacher"),
    )
    with mock.patch.object(teacher, "read_model", return_value=(TEACHER, "float64")):
        trainer = make_train_functions(config, mesh)
    params = {**random_params(STUDENT), "teacher": random_params(TEACHER, 1)}
    draws = np.random.default_rng(2)
    rows = draws.integers(0, 48, (8, 17)).astype(np.int32)
    batch = make_batch(rows, end_of_text=0, mask=draws.integers(0, 2, (8, 16)).astype(np.float32))
    if mesh is not None:
        params = jax.device_put(params, trainer.state_shardings.params)
    trained, frozen = split_params(params, trainer.partition)

    def step(trained: Any, frozen: Any) -> Any:
        return loss_and_gradients(trained, frozen, batch, None, trainer.objective, trainer.sharded, 2)[:2]

    return jax.device_get(jax.jit(step, compiler_options=QUICK)(trained, frozen))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    expected = results_on(None)
    found = results_on(make_mesh("data2.fsdp2.tensor2"))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    print(json.dumps(max(float(relative_error(x, y)) for x, y in pairs)))
