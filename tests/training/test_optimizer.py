"""Schedules against closed forms; parameter groups; a few steps against Adam written out in NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.config import OptimizerConfig
from rwkv_jax.models import RWKV7, model_type
from rwkv_jax.training.optimizer import clip_by_global_norm, in_stage_2, make_optimizer, parameter_groups
from rwkv_jax.training.schedule import learning_rate_schedule, weight_decay_schedule
from tests.models.parameters import SMALL, abstract, to_official

STEPS, WARMUP, PEAK, FINAL = 101, 20, 1e-3, 1e-4
CONFIG = OptimizerConfig(learning_rate=PEAK, final_learning_rate=FINAL, warmup_steps=WARMUP, decay_fraction=0.2)


def rate(config: OptimizerConfig, step: int, num_steps: int = STEPS) -> float:
    return np.asarray(learning_rate_schedule(config, num_steps)(jnp.int32(step))).item()


def cosine(step: int) -> float:
    progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return FINAL + (PEAK - FINAL) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int) -> float:
    return PEAK + (FINAL - PEAK) * (step - WARMUP) / (STEPS - 1 - WARMUP)


def wsd(step: int) -> float:
    decay = round(0.2 * STEPS)
    return PEAK + (FINAL - PEAK) * max(0, step - (STEPS - 1 - decay)) / decay


def exponential(step: int) -> float:
    decay = round(0.2 * STEPS)
    return PEAK * math.exp(math.log(FINAL / PEAK) * max(0, step - (STEPS - 1 - decay)) / decay)


def constant(step: int) -> float:
    return PEAK


@pytest.mark.parametrize("after", [cosine, linear, wsd, exponential, constant], ids=lambda function: function.__name__)
@pytest.mark.parametrize("step", [0, 1, 10, 19, 20, 21, 40, 60, 79, 80, 81, 90, 99, 100])
def test_learning_rate(after: Any, step: int) -> None:
    config = dataclasses.replace(CONFIG, schedule=after.__name__)
    expected = PEAK * (0.01 + 0.99 * step / WARMUP) if step < WARMUP else after(step)
    assert rate(config, step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "exponential"])
@pytest.mark.parametrize(("warmup", "steps", "decay_fraction"), [(0, 10, 0.2), (8, 10, 0.2), (5, 10, 1.0), (0, 2, 0.2)])
def test_the_rate_only_falls_after_the_warmup_and_ends_at_the_final_one(
    schedule: Any, warmup: int, steps: int, decay_fraction: float
) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup, decay_fraction=decay_fraction)
    rates = [rate(config, step, steps) for step in range(steps)]
    assert rates[-1] == pytest.approx(FINAL, rel=1e-5)
    assert max(rates) == rates[warmup] == pytest.approx(PEAK)
    assert np.all(np.diff(rates[warmup:]) <= 1e-9)


def test_an_exponential_decay_multiplies_by_the_same_factor_each_step_and_stops_at_the_final_rate() -> None:
    config = dataclasses.replace(CONFIG, schedule="exponential", warmup_steps=0, decay_fraction=0.5)
    rates = [rate(config, step, 21) for step in range(31)]
    assert rates[:11] == pytest.approx([PEAK] * 11)
    np.testing.assert_allclose(np.divide(rates[11:21], rates[10:20]), (FINAL / PEAK) ** 0.1, rtol=1e-5)
    assert rates[20:] == pytest.approx([FINAL] * 11)


def test_an_exponential_decay_from_the_peak_to_the_peak_is_constant() -> None:
    config = dataclasses.replace(CONFIG, schedule="exponential", warmup_steps=0, final_learning_rate=PEAK)
    assert [rate(config, step) for step in (0, 90, 100)] == pytest.approx([PEAK] * 3)


def test_without_warmup_the_first_step_has_the_peak_rate() -> None:
    assert rate(dataclasses.replace(CONFIG, warmup_steps=0), 0) == pytest.approx(PEAK)


# Groups

DECAYING = {
    "4": {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value", "ffn.receptance"},
    "5.0": {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value", "ffn.receptance"},
    "5.1": {"att.receptance", "att.key", "att.value", "att.gate", "att.output"}
    | {"ffn.key", "ffn.value", "ffn.receptance"},
    "5.2": {"att.receptance", "att.key", "att.value", "att.gate", "att.output"}
    | {"ffn.key", "ffn.value", "ffn.receptance"},
    "6": {"att.receptance", "att.key", "att.value", "att.gate", "att.output"}
    | {"ffn.key", "ffn.value", "ffn.receptance"},
    "7": {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"},
    "7-rosa": {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"}
    | {"rosa.q", "rosa.k", "rosa.v", "rosa.o"},
    "8-rosa": {"rosa.q", "rosa.k", "rosa.v", "rosa.o", "ffn.key", "ffn.value"},
}
DECAYING["8-rc00"] = DECAYING["7"] | {"ffn.enn"}
DECAYING["7a"] = DECAYING["7"] | {"ffn.s_emb", "ffn.s_emb_x"}
DECAYING["7b"] = DECAYING["7a"] | {"qkv.qq", *(f"qkv.{name}" for name in ("k_emb", "k_emb_x", "v_emb", "v_emb_x"))}
"""The matrices of a block whose weight decays, beside embedding and head."""

FACTORS = {
    "4": {"att.time_decay": 2.0, "att.time_first": 3.0},
    "5.0": {"att.time_decay": 2.0, "att.time_first": 3.0},
    "5.1": {"att.time_decay": 2.0},
    "5.2": {"att.time_decay": 2.0},
    "6": {"att.time_decay": 2.0},
    **{name: {"att.w0": 2.0} for name in ("7", "7a", "7b", "8-rc00")},
    "7-rosa": {"att.w0": 2.0},
    "8-rosa": {},
}
"""Parameters whose learning rate is not that of all others."""

NEITHER = {
    "4": ["att.time_mix_k", "ffn.time_mix_r"],
    "5.0": ["att.time_mix_k", "att.ln_x.weight"],
    "5.1": ["att.time_faaaa", "att.time_mix_g", "att.ln_x.weight"],
    "5.2": ["att.time_faaaa", "att.time_mix_g", "att.ln_x.weight"],
    "6": ["att.time_faaaa", "att.time_decay_w1", "att.time_decay_w2", "att.time_maa_w1", "att.time_maa_w2"],
    "7": ["att.w1", "att.w2", "att.a0", "att.v1", "att.g2", "att.r_k", "att.k_k", "att.ln_x.weight"],
    "7-rosa": ["att.w1", "rosa.x_q", "rosa.q.bias", "rosa.rosa_qkv.emb", "ln3.weight"],
    "8-rosa": ["ffn.x_k", "rosa.x_q", "rosa.o.bias", "rosa.rosa_qkv.emb", "ln3.weight"],
}
NEITHER["8-rc00"] = NEITHER["7"]
NEITHER["7a"] = [*NEITHER["7"], "ffn.s0", "ffn.s1", "ffn.s2"]
NEITHER["7b"] = [*NEITHER["7a"], "qkv.k1", "qkv.v2", "qkv.x_q", "qkv.lnv.weight"]
"""Some of those that could be taken for others: with two axes or more, or with names that begin alike."""


def decays(generation: str, name: str) -> bool:
    """By official name without the layer, such as `att.key.weight`."""
    return name in ("emb.weight", "head.weight", *(f"{matrix}.weight" for matrix in DECAYING[generation]))


@pytest.mark.parametrize("generation", SMALL)
def test_parameter_groups_are_the_official_ones(generation: str) -> None:
    params = abstract(SMALL[generation])[1]
    factors, decaying = parameter_groups(params, model_type(SMALL[generation]).parameter_group)
    pairs = jax.tree.leaves_with_path(jax.tree.map(lambda *pair: np.array(pair), factors, decaying))
    groups = {jax.tree_util.keystr(path, simple=True, separator="."): tuple(pair) for path, pair in pairs}
    assert len(groups) == len(jax.tree.leaves(params))
    seen = set()
    for name, (factor, decay) in groups.items():
        official = name.removeprefix("first_block.").removeprefix("blocks.")
        assert factor == FACTORS[generation].get(official, 1.0), name
        assert decay == decays(generation, official), name
        seen.add(official)
    assert seen >= FACTORS[generation].keys() | {f"{name}.weight" for name in DECAYING[generation]}
    # Stacked layers have an axis more, which must not turn vectors into matrices.
    for name in ("first_block.ln2.weight", "blocks.ln2.weight", *(f"blocks.{name}" for name in NEITHER[generation])):
        assert groups[name] == (1.0, False), name


# Steps


class Adam:
    """Adam with clipping, decoupled decay and groups, as the official trainer runs it, one official name at a time."""

    def __init__(self, config: OptimizerConfig, params: dict[str, np.ndarray]) -> None:
        self.config, self.params, self.count = config, dict(params), 0
        self.mean = {name: np.zeros_like(x) for name, x in params.items()}
        self.square = {name: np.zeros_like(x) for name, x in params.items()}

    def update(self, gradients: dict[str, np.ndarray], learning_rate: float) -> None:
        config = self.config
        norm = math.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        self.count += 1
        for name, gradient in gradients.items():
            g = gradient * scale
            self.mean[name] = config.beta1 * self.mean[name] + (1 - config.beta1) * g
            self.square[name] = config.beta2 * self.square[name] + (1 - config.beta2) * g**2
            mean = self.mean[name] / (1 - config.beta1**self.count)
            square = self.square[name] / (1 - config.beta2**self.count)
            update = mean / (np.sqrt(square) + config.epsilon)
            if decays("7", name.removeprefix("blocks.").lstrip("0123456789.")):
                update = update + config.weight_decay * self.params[name]
            rate = learning_rate * (2 if name.endswith("att.w0") else 1)
            self.params[name] = self.params[name] - rate * update


@pytest.mark.parametrize("clip_norm", [pytest.param(0.0, marks=pytest.mark.long), 1.0])
def test_steps_equal_adam_written_out(float64: None, clip_norm: float) -> None:
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm, weight_decay=0.5, warmup_steps=2)
    rng = np.random.default_rng(0)

    def draw(scale: float) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape)), abstract(SMALL["7"])[1])

    params = draw(1.0)
    optimizer = make_optimizer(config, STEPS, params, RWKV7.parameter_group)
    state = optimizer.init(params)
    reference = Adam(config, to_official(SMALL["7"], params))
    step = jax.jit(optimizer.update)
    for count, scale in enumerate([1.0, 1e-4, 1e-9, 3.0]):  # norms far above and far below the clipping norm
        gradients = draw(scale)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.update(to_official(SMALL["7"], gradients), rate(config, count))
        for name, x in to_official(SMALL["7"], params).items():
            np.testing.assert_allclose(x, reference.params[name], rtol=0, atol=1e-12 * PEAK, err_msg=name)


def test_tiny_gradients_take_full_steps() -> None:
    # Epsilon is 1e-18 so that Adam's step does not depend on the gradient's scale; float32 moments still hold 1e-30.
    params = {"emb": {"weight": jnp.ones((2, 2))}}
    config = dataclasses.replace(CONFIG, weight_decay=0.0, warmup_steps=0, clip_norm=0.0)
    optimizer = make_optimizer(config, STEPS, params, RWKV7.parameter_group)
    gradients = {"emb": {"weight": jnp.full((2, 2), 1e-15)}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["emb"]["weight"], np.full((2, 2), -PEAK), rtol=2e-3)  # pyright: ignore


def test_the_official_clipping_adds_1e_6_to_the_norm(float64: None) -> None:
    gradients = {"x": jnp.array([3.0, 4.0])}
    clip = clip_by_global_norm(0.5, 1e-6)
    updates, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(updates["x"], np.array([3.0, 4.0]) * 0.5 / (5 + 1e-6), rtol=1e-15)  # pyright: ignore
    small = {"x": jnp.array([3e-2, 4e-2])}
    np.testing.assert_array_equal(clip.update(small, clip.init(small))[0]["x"], small["x"])  # pyright: ignore


def test_weight_decay_that_falls_is_that_of_each_step() -> None:
    params = {"emb": {"weight": jnp.ones((2, 2))}}
    config = dataclasses.replace(
        CONFIG, schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.1, weight_decay_final=0.01
    )
    optimizer = make_optimizer(config, STEPS, params, RWKV7.parameter_group)
    state, schedule = optimizer.init(params), weight_decay_schedule(config, STEPS)
    for step in range(3):
        updates, state = optimizer.update({"emb": {"weight": jnp.zeros((2, 2))}}, state, params)
        expected = -PEAK * np.asarray(schedule(step))
        np.testing.assert_allclose(updates["emb"]["weight"], np.full((2, 2), expected), rtol=1e-6)  # pyright: ignore


def test_a_run_that_takes_up_later_has_that_steps_rate_and_decay_and_new_moments(float64: None) -> None:
    params = {"emb": {"weight": jnp.full((2, 2), 3.0)}}
    config = dataclasses.replace(CONFIG, warmup_steps=2, weight_decay=0.1, weight_decay_final=0.01)
    optimizer = make_optimizer(config, STEPS, params, RWKV7.parameter_group, first_step=50)
    state = optimizer.init(params)
    rates, decays = learning_rate_schedule(config, STEPS, 50), weight_decay_schedule(config, STEPS)
    for step in range(50, 54):
        updates, state = optimizer.update({"emb": {"weight": jnp.full((2, 2), 1e-3)}}, state, params)
        expected = -np.asarray(rates(step)) * (1 + 3 * np.asarray(decays(step)))  # Adam's of equal gradients is 1
        np.testing.assert_allclose(updates["emb"]["weight"], np.full((2, 2), expected), rtol=1e-12)  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("time_mix_k", 5.0),
        ("time_maa_x", 5.0),
        ("time_decay", 5.0),
        ("time_first", 5.0),
        ("time_faaaa", 5.0),
        ("w0", 5.0),
        ("time_maa_w1", 1.0),
        ("time_decay_w2", 1.0),
        ("a0", 1.0),
        ("weight", 1.0),
    ],
)
def test_in_the_second_stage_blends_and_decay_learn_five_times_as_fast(name: str, factor: float) -> None:
    assert in_stage_2(("blocks", "att", name), 1.0) == factor
