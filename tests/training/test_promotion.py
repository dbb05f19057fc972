"""The training step under JAX's strictest settings: no axis and no dtype is promoted without being asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax.config import OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions
from rwkv_jax.training.schedule import learning_rate_schedule, weight_decay_schedule
from rwkv_jax.training.step import loss_and_gradients
from tests.models.parameters import SMALL


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_loss_and_gradients_promote_nothing(strict_promotion: None, accumulation_steps: int) -> None:
    training = StepConfig(batch_size=4, sequence_length=16, accumulation_steps=accumulation_steps, loss_chunk=16)
    config = TrainConfig(model=dataclasses.replace(SMALL["7"], dtype="float32"), training=training)
    functions = make_train_functions(config)
    params, batch = abstract_state(functions).params, abstract_batch(functions, config)

    def step(params: Any, batch: Any) -> Any:
        return loss_and_gradients(
            params, {}, batch, None, functions.objective, functions.sharded, functions.accumulation_steps
        )

    (loss, _), gradients, _ = jax.eval_shape(step, params, batch)
    assert loss.dtype == jnp.float32
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(gradients)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(params)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "exponential", "constant"])
def test_schedules_promote_nothing(strict_promotion: None, schedule: str) -> None:
    # Optax's own bias correction does, so its update is left out.
    config = OptimizerConfig(schedule=schedule, schedule_steps=(20, 30), weight_decay_final=0.01)  # pyright: ignore
    for function in (learning_rate_schedule(config, 50), weight_decay_schedule(config, 50)):
        assert jax.eval_shape(function, jnp.zeros((), jnp.int32)).dtype == jnp.float32
