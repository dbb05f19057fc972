"""Learning rates by patterns of names, and what they freeze: whole parameters, and single layers of a stack."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, OptimizerConfig, StepConfig, TrainConfig, TuningConfig
from rwkv_jax.digests import paths_of
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.rates import learning_layers, matches, rate_factors
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.step import loss_and_gradients
from tests.golden import QUICK
from tests.models.parameters import abstract, random_params
from tests.small_runs import assert_same_bits
from tests.training.batches import one_batch

MODEL = ModelConfig("4", vocab_size=32, num_layers=3, width=16, ffn_width=32, wkv_implementation="scan")
PARAMS = abstract(MODEL)[1]


def config_with(*rates: tuple[str, float], **training: Any) -> TrainConfig:
    steps: dict[str, Any] = {"batch_size": 2, "sequence_length": 8, "num_steps": 4} | training
    return TrainConfig(
        model=MODEL,
        initial_weights="base",
        data=DataConfig(tokenizer="bytes"),
        optimizer=OptimizerConfig(warmup_steps=0, rates=rates),
        training=StepConfig(**steps),
    )


FROZEN = config_with(
    ("emb", 0.0),
    ("att.time_mix_k", 0.25),
    ("blocks.1.*", 0.0),
    ("ffn.value", 0.0),
    ema_decay=0.9,
    first_step=100,
    num_steps=10**6,
)


def float32_params() -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_params(MODEL))


@functools.cache
def compiled(config: TrainConfig) -> tuple[TrainFunctions, TrainState, Any]:
    """The trainer, a state of random parameters, some of them -0.0, and the step."""
    trainer, params = make_train_functions(config), float32_params()
    params["blocks"]["ln1"]["weight"] = params["blocks"]["ln1"]["weight"].at[:, 0].set(-0.0)
    trained, _ = split_params(params, trainer.partition)
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = state._replace(
        step=jnp.asarray(config.training.first_step),
        params=params,
        opt_state=trainer.optimizer.init(trained),
        ema=trainer.first_averages(params),
    )
    return trainer, state, jax.jit(trainer.train_step, compiler_options=QUICK)


def after_steps(config: TrainConfig, num: int = 2) -> tuple[TrainFunctions, Any, TrainState]:
    """The trainer, the parameters before, and the state after some steps."""
    trainer, first, step = compiled(config)
    state = first
    for _ in range(num):
        state, _ = step(state, one_batch(config))
    return trainer, first.params, state


def test_patterns_match_official_names_whole_or_within_a_layer() -> None:
    for pattern in ("blocks.1.att.key.weight", "blocks.1.*", "att.key", "att.*", "*.weight", "blocks.*.key"):
        assert matches("blocks.1.att.key.weight", pattern)
    for pattern in ("blocks.10.*", "key", "ffn.*", "blocks.1"):
        assert not matches("blocks.1.att.key.weight", pattern)


def test_the_last_pattern_that_matches_counts_and_layers_of_a_stack_have_their_own() -> None:
    found = rate_factors(PARAMS, (("att.*", 0.5), ("blocks.2.*", 2.0), ("emb", 0.0)))
    assert found["first_block"]["att"]["key"]["weight"] == 0.5
    assert found["blocks"]["att"]["key"]["weight"].shape == (MODEL.num_layers - 1, 1, 1)
    assert found["blocks"]["att"]["key"]["weight"].ravel()[:2].tolist() == [0.5, 2.0]
    assert found["blocks"]["ffn"]["key"]["weight"].ravel()[:2].tolist() == [1.0, 2.0]
    assert (found["emb"]["weight"], found["head"]["weight"]) == (0.0, 1.0)


def test_a_frozen_parameter_has_no_optimizer_state_and_a_frozen_layer_keeps_its_bits() -> None:
    trainer, before, state = after_steps(FROZEN)
    _, frozen = split_params(before, trainer.partition)
    assert set(frozen) == {"emb", "first_block", "blocks"}
    assert set(frozen["blocks"]) == {"ffn"}
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)}
    assert not any("emb" in name or "ffn']['value" in name for name in moments)
    assert any("head" in name for name in moments)
    first_of_stack = [jax.tree.map(lambda x: x[0], params["blocks"]) for params in (before, state.params)]
    assert_same_bits(*first_of_stack)
    assert_same_bits(before["emb"], state.params["emb"])
    other_layer = jax.tree.map(
        lambda old, new: np.array_equal(old[1], new[1]), before["blocks"], state.params["blocks"]
    )
    assert [name for name, same in paths_of(other_layer).items() if same] == ["ffn.value.weight"]
    # Adam has seen nothing of the frozen layer either.
    mu = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    assert not np.any(np.asarray(mu["blocks"]["att"]["key"]["weight"][0]))
    assert np.any(np.asarray(mu["blocks"]["att"]["key"]["weight"][1]))


def test_a_factor_scales_the_step_of_its_layers_alone() -> None:
    # Adam's first step is the rate times the sign of the gradient, of vectors, which do not decay.
    _, before, state = after_steps(FROZEN, 1)
    old, new = (params["blocks"]["att"]["time_mix_k"] for params in (before, state.params))
    rate, moved = FROZEN.optimizer.learning_rate, np.abs(np.asarray(new - old))
    assert not moved[0].any()
    np.testing.assert_allclose(moved[1], 0.25 * rate, rtol=1e-3)
    np.testing.assert_allclose(np.abs(state.params["ln_out"]["bias"] - before["ln_out"]["bias"]), rate, rtol=1e-3)


def test_the_norm_that_is_clipped_and_reported_is_without_frozen_layers() -> None:
    trainer, state, step = compiled(FROZEN)
    _, metrics = step(state, one_batch(FROZEN))
    trained, frozen = split_params(state.params, trainer.partition)
    find = functools.partial(loss_and_gradients, objective=trainer.objective, sharded=trainer.sharded)
    _, gradients, _ = jax.jit(find, compiler_options=QUICK)(trained, frozen, one_batch(FROZEN), None)
    whole = float(optax.tree.norm(gradients))
    gradients["blocks"] = jax.tree.map(lambda x: x.at[0].set(0), gradients["blocks"])
    assert float(metrics.gradient_norm) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    assert float(metrics.gradient_norm) < 0.999 * whole


def test_without_rates_nothing_is_different() -> None:
    assert learning_layers(PARAMS, ()) is None
    assert make_train_functions(config_with()).learning_layers is None


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((("att.kye", 0.1),), "optimizer.rates = 'att.kye': no such parameter; did you mean"),
        ((("*", 0.0),), "trains none"),
    ],
)
def test_patterns_that_name_nothing_or_leave_nothing_are_refused(rates: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_train_functions(config_with(*rates))


def test_a_matrix_names_its_adapter_and_what_is_not_trained_is_refused() -> None:
    config = dataclasses.replace(
        config_with(("att.key", 0.0), ("blocks.1.att.value", 0.5)),
        tuning=TuningConfig("lora", rank=4, targets=("att.*",)),
    )
    trainer = make_train_functions(config)
    trained, _ = split_params(trainer.params, trainer.partition)
    adapter = trained["adapter"]["blocks"]["att"]
    assert adapter.keys() == {"receptance", "value", "output"}
    factors = rate_factors(trained, config.optimizer.rates)["adapter"]["blocks"]["att"]
    for part in ("lora_A", "lora_B"):
        assert factors["value"][part].ravel().tolist() == [0.5, 1.0]
        assert factors["output"][part] == 1.0
    rates = dataclasses.replace(config.optimizer, rates=(("ffn.key", 0.1),))
    with pytest.raises(ConfigError, match=r"^optimizer\.rates = 'ffn\.key': the run does not train this parameter"):
        make_train_functions(dataclasses.replace(config, optimizer=rates))


@pytest.mark.parametrize("rates", [(("att.*", -1.0),), (("", 1.0),), (("att.*", float("nan")),)])
def test_a_factor_must_not_be_negative(rates: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rates"):
        OptimizerConfig(rates=rates)


def test_averages_follow_the_trained_weights_by_their_definition() -> None:
    trainer, state, step = compiled(FROZEN)
    expected = state.params["head"]["weight"]
    for s in range(3):  # of the run, whose first step is a later one
        state, _ = step(state, one_batch(FROZEN))
        decay = min(0.9, (1 + s) / (10 + s))
        expected = decay * expected + (1 - decay) * state.params["head"]["weight"]
    np.testing.assert_allclose(state.ema["head"]["weight"], expected, rtol=1e-5, atol=1e-9)
    assert "emb" not in state.ema
    taken = trainer.averaged_params(state)
    assert taken["emb"]["weight"] is state.params["emb"]["weight"]
    assert taken["head"]["weight"] is state.ema["head"]["weight"]
    assert jax.tree.structure(taken) == jax.tree.structure(state.params)


def test_a_skipped_step_leaves_the_averages() -> None:
    _, state, step = compiled(FROZEN)
    broken = state._replace(params=state.params | {"head": {"weight": state.params["head"]["weight"] * jnp.nan}})
    after, metrics = step(broken, one_batch(FROZEN))
    assert not bool(metrics.taken)
    assert_same_bits(state.ema, after.ema)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_the_share_of_an_average_lies_between_0_and_1(decay: float) -> None:
    with pytest.raises(ConfigError, match="ema_decay"):
        StepConfig(ema_decay=decay)
