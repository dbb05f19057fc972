"""The training and evaluation steps as wholes: what is optimized, reported, skipped and compiled."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from rwkv_jax.config import OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.models import RWKV7
from rwkv_jax.training.batch import Batch, make_batch
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.optimizer import make_optimizer
from rwkv_jax.training.state import EvalSums, StepMetrics, TrainState
from tests.golden import QUICK, relative_error
from tests.models import parameters
from tests.models.parameters import merge, random_params
from tests.programs import compilations

SMALL = parameters.SMALL["7"]
CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1),
    training=StepConfig(num_steps=40, batch_size=8, sequence_length=9, l2wrap=1e-2),
)
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (8, 10)).astype(np.int32)
BATCH = make_batch(TOKENS, end_of_text=None)


@functools.cache
def trainer_of(config: TrainConfig) -> TrainFunctions:
    return make_train_functions(config)


@functools.cache
def train_step(config: TrainConfig = CONFIG) -> Any:
    return jax.jit(trainer_of(config).train_step, compiler_options=QUICK)


@functools.cache
def eval_step(config: TrainConfig = CONFIG) -> Any:
    return jax.jit(trainer_of(config).eval_step, compiler_options=QUICK)


def start(config: TrainConfig = CONFIG) -> TrainState:
    """A state before its first step, with parameters at which no gradient is zero."""
    shapes = jax.eval_shape(trainer_of(config).init, jax.random.key(0))
    zeros: TrainState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros._replace(params=jax.tree.map(jnp.asarray, random_params(config.model)))


def in_bytes(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# What is optimized


@pytest.fixture(scope="module")
def first_step() -> tuple[TrainState, StepMetrics]:
    with jax.enable_x64(True):
        return train_step()(start(), BATCH)


def test_a_step_is_adam_on_cross_entropy_and_l2wrap(float64: None, first_step: tuple[TrainState, StepMetrics]) -> None:
    def objective(params: Any) -> tuple[Array, Array]:
        logits, _ = merge(SMALL, params)(jnp.asarray(TOKENS[:, :-1]))
        nll = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1))
        return nll + 0.5 * CONFIG.training.l2wrap * jnp.mean(jnp.max(logits, axis=-1) ** 2), nll

    @functools.partial(jax.jit, compiler_options=QUICK)
    def reference(params: Any) -> tuple[Array, Array, Any]:
        (_, nll), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        optimizer = make_optimizer(CONFIG.optimizer, CONFIG.training.num_steps, params, RWKV7.parameter_group)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return nll, optax.tree.norm(gradients), optax.apply_updates(params, updates)

    nll, norm, expected = reference(start().params)
    state, metrics = first_step
    assert relative_error(metrics.loss, nll) < 1e-12
    assert relative_error(metrics.gradient_norm, norm) < 1e-10
    assert bool(metrics.taken)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)
    assert (int(state.step), int(state.bad_steps), int(state.skipped_steps)) == (1, 0, 0)


def test_micro_batches_add_up_to_the_batch(float64: None, first_step: tuple[TrainState, StepMetrics]) -> None:
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, accumulation_steps=4))
    state, metrics = train_step(config)(start(config), BATCH)
    expected_state, expected_metrics = first_step
    assert relative_error(metrics.loss, expected_metrics.loss) < 1e-12
    assert relative_error(metrics.gradient_norm, expected_metrics.gradient_norm) < 1e-12
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)


def test_the_loss_of_one_batch_falls(float64: None) -> None:
    state, losses = start(), []
    for _ in range(CONFIG.training.num_steps):
        state, metrics = train_step()(state, BATCH)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == CONFIG.training.num_steps


@pytest.mark.long
@pytest.mark.parametrize("generation", ["4", "5.0", "5.2", "6"])
def test_every_generation_learns(float64: None, generation: str) -> None:
    """From its official initial values, in micro-batches, with each block recomputed."""
    training = dataclasses.replace(CONFIG.training, accumulation_steps=2, remat="full", l2wrap=0.0)
    optimizer = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0)
    config = TrainConfig(model=parameters.SMALL[generation], training=training, optimizer=optimizer)
    params = jax.tree.map(jnp.asarray, parameters.initial_params(config.model))
    shapes = jax.eval_shape(trainer_of(config).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(params=params)
    step = jax.jit(trainer_of(config).train_step, compiler_options=QUICK)
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        assert bool(metrics.taken)
        losses.append(float(metrics.loss))
    total = jax.jit(trainer_of(config).eval_step, compiler_options=QUICK)(params, BATCH)
    assert relative_error(losses[0], total.loss / total.count) < 1e-12
    assert losses[-1] < 0.25 * losses[0], losses
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert np.any(before != after)


# Evaluation


def test_evaluation_gives_the_loss_that_training_reports(
    float64: None, first_step: tuple[TrainState, StepMetrics]
) -> None:
    total = eval_step()(start().params, BATCH)
    assert total.count == 72
    assert relative_error(total.loss / total.count, first_step[1].loss) < 1e-12


def test_masked_tokens_are_read_but_not_counted(float64: None) -> None:
    params = start().params

    def evaluate(mask: np.ndarray) -> EvalSums:
        return eval_step()(params, BATCH._replace(mask=mask))

    mask = np.random.default_rng(1).integers(0, 2, (8, 9)).astype(np.float32)
    parts = [evaluate(m) for m in (mask, 1 - mask)]
    whole = evaluate(np.ones_like(mask))
    for name in ("loss", "count"):
        assert relative_error(sum(getattr(part, name) for part in parts), getattr(whole, name)) < 1e-12
    assert parts[0].count == mask.sum()
    assert not np.isclose(parts[0].loss / parts[0].count, parts[1].loss / parts[1].count)


# Steps that are not finite


def spoil_tokens(state: TrainState) -> tuple[TrainState, Batch]:
    return state, make_batch(np.full_like(TOKENS, SMALL.vocab_size), end_of_text=None)


def spoil_parameters(state: TrainState) -> tuple[TrainState, Batch]:
    head = state.params["head"]["weight"].at[0, 0].set(jnp.nan)
    return state._replace(params=state.params | {"head": {"weight": head}}), BATCH


def spoil_gradient(state: TrainState) -> tuple[TrainState, Batch]:
    # The loss is as before, but the gradient of ln_out overflows.
    params = state.params | {
        "ln_out": jax.tree.map(lambda x: x * 1e-200, state.params["ln_out"]),
        "head": jax.tree.map(lambda x: x * 1e200, state.params["head"]),
    }
    return state._replace(params=params), BATCH


@pytest.mark.parametrize(
    ("spoil", "loss_is_finite"),
    [
        pytest.param(spoil_tokens, False, id="tokens"),
        pytest.param(spoil_parameters, False, id="parameters"),
        pytest.param(spoil_gradient, True, id="gradient"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(
    float64: None, first_step: tuple[TrainState, StepMetrics], spoil: Any, loss_is_finite: bool
) -> None:
    before, batch = spoil(first_step[0])
    once, metrics = train_step()(before, batch)
    twice, _ = train_step()(once, batch)
    assert not bool(metrics.taken)
    assert bool(jnp.isfinite(metrics.loss)) == loss_is_finite
    assert in_bytes((twice.params, twice.opt_state, twice.key)) == in_bytes(
        (before.params, before.opt_state, before.key)
    )
    assert [int(x) for x in (once.step, once.bad_steps, once.skipped_steps)] == [2, 1, 1]
    assert [int(x) for x in (twice.step, twice.bad_steps, twice.skipped_steps)] == [3, 2, 2]

    after, metrics = train_step()(twice._replace(params=first_step[0].params), BATCH)
    assert bool(metrics.taken)
    assert [int(x) for x in (after.step, after.bad_steps, after.skipped_steps)] == [4, 0, 2]
    assert in_bytes(after.params) != in_bytes(first_step[0].params)


# What is compiled


FLOAT32 = dataclasses.replace(CONFIG, model=dataclasses.replace(SMALL, dtype="float32"))


def test_a_step_is_compiled_once() -> None:
    trainer = make_train_functions(FLOAT32)
    state = jax.jit(trainer.init, compiler_options=QUICK)(jax.random.key(0))
    step = jax.jit(trainer.train_step, donate_argnums=0, compiler_options=QUICK)
    counts = []
    for seed in range(3):
        rows = np.random.default_rng(seed).integers(0, SMALL.vocab_size, TOKENS.shape).astype(np.int32)
        with compilations() as events:
            state, _ = step(state, make_batch(rows, end_of_text=None))
            jax.block_until_ready(state)
        counts.append(len(events))
    assert counts == [1, 0, 0]
    assert int(state.step) == 3


def lowered(num_layers: int) -> jax.stages.Lowered:
    config = dataclasses.replace(FLOAT32, model=dataclasses.replace(FLOAT32.model, num_layers=num_layers))
    trainer = make_train_functions(config)
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    return jax.jit(trainer.train_step).lower(state, BATCH)


def test_the_program_does_not_grow_with_depth() -> None:
    three, twelve = (lowered(layers).as_text().count("\n") for layers in (3, 12))
    assert twelve == three


@pytest.mark.long  # it measures time, which a busy machine spoils
def test_time_of_compilation_does_not_grow_with_depth() -> None:
    def seconds(num_layers: int) -> float:
        program = lowered(num_layers)
        begin = time.process_time()
        program.compile()
        return time.process_time() - begin

    seconds(2)  # warms up
    three, twelve = seconds(3), seconds(12)
    assert twelve < 1.5 * three, (three, twelve)
