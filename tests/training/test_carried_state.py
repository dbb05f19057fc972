"""Truncated backpropagation: rows go on where they stopped, with the state that they were left with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.state import TrainState
from tests.golden import QUICK, relative_error
from tests.models.parameters import SMALL, random_params

TEXT = np.random.default_rng(1).integers(1, 41, (4, 25)).astype(np.int32)
TEXT[1, 8] = 0  # a document ends with the first step
TEXT[2, 13] = 0  # and one within the second


def config(**training: Any) -> TrainConfig:
    return TrainConfig(
        model=SMALL["7"],
        # Parameters that a step hardly moves: what the next step reads must come from the state.
        optimizer=OptimizerConfig(learning_rate=1e-14, final_learning_rate=1e-14, weight_decay=0.0, warmup_steps=0),
        training=StepConfig(**{"batch_size": 4, "sequence_length": 8, "num_steps": 3, "l2wrap": 0.0} | training),
    )


@functools.cache
def trainer_and_step(config: TrainConfig) -> tuple[TrainFunctions, Any]:
    trainer = make_train_functions(config)
    return trainer, jax.jit(trainer.train_step, compiler_options=QUICK)


def begin(trainer: TrainFunctions) -> TrainState:
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    state: TrainState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return state._replace(params=jax.tree.map(jnp.asarray, random_params(SMALL["7"])))


def losses_of_three_steps(**training: Any) -> tuple[list[float], TrainState]:
    trainer, step = trainer_and_step(config(carry_state=True, **training))
    state, losses = begin(trainer), []
    for start in (0, 8, 16):
        batch = make_batch(TEXT[:, start : start + 9], end_of_text=0, carries_state=True)
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return losses, state


@pytest.fixture(scope="module")
def three_steps() -> tuple[list[float], TrainState]:
    with jax.enable_x64(True):
        return losses_of_three_steps()


def test_three_steps_read_what_one_long_step_reads(float64: None, three_steps: tuple[list[float], TrainState]) -> None:
    trainer, _ = trainer_and_step(config(sequence_length=24))
    whole = jax.jit(trainer.eval_step, compiler_options=QUICK)(begin(trainer).params, make_batch(TEXT, end_of_text=0))
    assert relative_error(np.mean(three_steps[0]), whole.loss / whole.count) < 1e-12
    # And not what three steps read that know nothing of each other.
    apart, _ = trainer_and_step(config())
    evaluate = jax.jit(apart.eval_step, compiler_options=QUICK)
    alone = evaluate(begin(apart).params, make_batch(TEXT[:, 8:17], end_of_text=0))
    assert abs(three_steps[0][1] - alone.loss / alone.count) > 1e-3


def test_micro_batches_carry_their_own_rows(float64: None, three_steps: tuple[list[float], TrainState]) -> None:
    losses, state = losses_of_three_steps(accumulation_steps=2)
    np.testing.assert_allclose(losses, three_steps[0], rtol=1e-12)
    for ours, theirs in zip(
        jax.tree.leaves(state.recurrent_state), jax.tree.leaves(three_steps[1].recurrent_state), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-12


def test_a_step_that_is_not_finite_leaves_empty_states(float64: None) -> None:
    trainer, step = trainer_and_step(config(carry_state=True))
    state, _ = step(begin(trainer), make_batch(TEXT[:, :9], end_of_text=0, carries_state=True))
    assert any(np.any(x) for x in jax.tree.leaves(state.recurrent_state))
    bad = make_batch(np.full((4, 9), SMALL["7"].vocab_size, np.int32), end_of_text=0, carries_state=True)
    state, metrics = step(state, bad)
    assert not bool(metrics.taken)
    assert not any(np.any(x) for x in jax.tree.leaves(state.recurrent_state))


def test_nothing_of_the_document_before_is_seen_in_a_row(float64: None) -> None:
    """The loss of the second document is the same whatever the first one is; without resets it is not."""

    def second_loss(first: int, resets: bool) -> float:
        trainer, _ = trainer_and_step(config())
        rows = np.full((4, 9), first, np.int32)
        rows[:, 4:] = [0, 5, 6, 7, 8]
        mask = np.tile(np.arange(8) >= 4, (4, 1)).astype(np.float32)
        batch = make_batch(rows, end_of_text=0 if resets else None, mask=mask)
        sums = jax.jit(trainer.eval_step, compiler_options=QUICK)(begin(trainer).params, batch)
        return float(sums.loss / sums.count)

    assert second_loss(1, resets=True) == second_loss(2, resets=True)
    assert abs(second_loss(1, resets=False) - second_loss(2, resets=False)) > 1e-3
