"""Losses of preferences and rewards against numbers that trl gave, and KTO against its formula in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.training.objectives.dpo import dpo_losses, dpo_metrics
from rwkv_jax.training.objectives.grpo import advantages, grpo_token_losses, token_weights
from rwkv_jax.training.objectives.kto import kto_losses
from rwkv_jax.training.objectives.orpo import orpo_losses
from rwkv_jax.training.objectives.reply import ReplyLogP
from rwkv_jax.training.objectives.simpo import simpo_losses
from tests.golden import QUICK, load_golden, relative_error

GOLDEN = load_golden("tuning/preference_s0.npz")
BOUND = 1e-10
pytestmark = pytest.mark.usefixtures("float64")


def cases(pattern: str) -> list[re.Match[str]]:
    """The settings for which there are numbers, from the names of the keys."""
    found = [match for key in GOLDEN if (match := re.fullmatch(pattern + r"\.loss", key))]
    assert found, pattern
    return found


def check(name: str, loss: Callable[[Array], Array], x: np.ndarray, mean: Callable[[Array], Array] = jnp.mean) -> None:
    """The mean loss and its gradient are the reference's."""
    value, gradient = jax.jit(jax.value_and_grad(lambda x: mean(loss(x))), compiler_options=QUICK)(x)
    assert abs(float(value) - float(GOLDEN[f"{name}.loss"])) < BOUND
    assert relative_error(gradient, GOLDEN[f"{name}.grad"]) < BOUND


def dpo_pair(log_p: Array) -> tuple[ReplyLogP, ReplyLogP]:
    """Chosen and rejected replies of log-probabilities [2B, T]."""
    mask = jnp.asarray(GOLDEN["dpo.completion_mask"][:, 1:], jnp.float64)
    total, reference = jnp.sum(log_p * mask, axis=1), jnp.sum(GOLDEN["dpo.ref_logps"] * mask, axis=1)
    halves = zip(*(jnp.split(x, 2) for x in (total, jnp.sum(mask, axis=1), reference)), strict=True)
    chosen, rejected = (ReplyLogP(*half) for half in halves)
    return chosen, rejected


DPO = cases(r"dpo\.(cdpo_sigmoid|sigmoid|robust|ipo|hinge|sigmoid_norm)_beta([\d.]+?)(?:_ls([\d.]+?))?")


@pytest.mark.parametrize("case", DPO, ids=lambda case: case[0])
def test_dpo(case: re.Match[str]) -> None:
    kind, beta, smoothing = case[1].removeprefix("cdpo_"), float(case[2]), float(case[3] or 0)

    def loss(log_p: Array) -> Array:
        return dpo_losses(*dpo_pair(log_p), loss=kind, beta=beta, label_smoothing=smoothing)  # pyright: ignore[reportArgumentType]

    name = case[0].removesuffix(".loss")
    check(name, loss, GOLDEN["dpo.policy_logps"])
    if kind == "sigmoid" and not smoothing:
        metrics = dpo_metrics(*dpo_pair(jnp.asarray(GOLDEN["dpo.policy_logps"])), beta)
        found = [metrics[part].mean() for part in ("reward_chosen", "reward_rejected", "accuracy", "margin")]
        assert relative_error(found, GOLDEN[f"{name}.rewards"]) < BOUND


def pair(values: Array) -> tuple[ReplyLogP, ReplyLogP]:
    """Chosen and rejected replies of one token, whose mean is their sum."""
    half = len(values) // 2
    one = jnp.ones(half)
    return ReplyLogP(values[:half], one), ReplyLogP(values[half:], one)


@pytest.mark.parametrize("case", cases(r"orpo\.beta([\d.]+?)"), ids=lambda case: case[0])
def test_orpo(case: re.Match[str]) -> None:
    """trl's first term is another mean than the paper's, and a given number here."""

    def loss(values: Array) -> Array:
        chosen, rejected = pair(values)
        return orpo_losses(chosen, rejected, beta=float(case[1])) + chosen.mean + GOLDEN["pair.nll"]

    check(case[0].removesuffix(".loss"), loss, GOLDEN["pair.avg_logps"])


def test_orpo_begins_with_the_likelihood_of_the_chosen_reply() -> None:
    chosen, rejected = pair(jnp.asarray(GOLDEN["pair.avg_logps"]))
    np.testing.assert_allclose(orpo_losses(chosen, rejected, beta=0.0), -chosen.mean, rtol=1e-12)


@pytest.mark.parametrize(
    "case", cases(r"simpo\.beta([\d.]+?)_gamma([\d.]+?)_ls([\d.]+?)_alpha0\.0"), ids=lambda case: case[0]
)
def test_simpo(case: re.Match[str]) -> None:
    beta, gamma, smoothing = map(float, case.groups())

    def loss(values: Array) -> Array:
        return simpo_losses(*pair(values), beta=beta, gamma=gamma, label_smoothing=smoothing)

    check(case[0].removesuffix(".loss"), loss, GOLDEN["pair.avg_logps"])


def test_kto_is_its_formula() -> None:
    """Against the equations in NumPy, with the derivative of 1 - sigmoid by hand; no gradient flows through z."""
    draws = np.random.default_rng(0)
    log_p, reference, desirable = draws.normal(-9, 3, 8), draws.normal(-9, 3, 8), draws.random(8) < 0.5
    beta, kl, weights = 0.3, 0.7, (1.3, 0.6)

    def loss(log_p: Array) -> Array:
        reply = ReplyLogP(log_p, jnp.ones(8), jnp.asarray(reference))
        depends = kl + 0 * jnp.sum(log_p)
        settings = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        return kto_losses(reply, jnp.asarray(desirable), depends, beta=beta, **settings)

    ratio = log_p - reference
    sign, weight = np.where(desirable, 1, -1), np.where(desirable, *weights)
    share = 1 / (1 + np.exp(-sign * beta * (ratio - kl)))
    value, gradient = jax.value_and_grad(lambda x: jnp.mean(loss(x)))(jnp.asarray(log_p))
    assert relative_error(value, np.mean(weight * (1 - share))) < BOUND
    assert relative_error(gradient, -weight * sign * beta * share * (1 - share) / 8) < BOUND


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: str) -> None:
    found = advantages(jnp.asarray(GOLDEN["grpo.rewards"]), int(GOLDEN["grpo.num_generations"]), scale)  # pyright: ignore[reportArgumentType]
    assert relative_error(found, GOLDEN[f"grpo.advantages_{scale}"]) < 1e-7  # trl's are float32


GRPO = cases(
    r"grpo\.(grpo|bnpo|dapo|dr_grpo)_beta([\d.]+?)_eps([\d.]+)_([\d.]+?)_(token|sequence)"
    r"(?:_delta([\d.]+?))?(_onpolicy)?"
)


@pytest.mark.parametrize("case", GRPO, ids=lambda case: case[0])
def test_grpo(case: re.Match[str]) -> None:
    kind, level, on_policy = case[1], case[5], case[7]
    kl_weight, low, high = (float(case[part]) for part in (2, 3, 4))
    mask = jnp.asarray(GOLDEN["grpo.mask"], jnp.float64)

    def loss(log_p: Array) -> Array:
        return grpo_token_losses(
            log_p,
            jax.lax.stop_gradient(log_p) if on_policy else jnp.asarray(GOLDEN["grpo.old_logps"]),
            jnp.asarray(GOLDEN["grpo.ref_logps"]) if kl_weight else None,
            jnp.asarray(GOLDEN["grpo.advantages_group"]),
            mask,
            clip_low=low,
            clip_high=high,
            kl_weight=kl_weight,
            level=level,  # pyright: ignore[reportArgumentType]
            max_ratio=float(case[6]) if case[6] else None,
        )

    def mean(losses: Array) -> Array:
        weights, count = token_weights(mask, kind, int(GOLDEN["grpo.dr_grpo_max_completion_length"]))  # pyright: ignore[reportArgumentType]
        return jnp.sum(losses * weights) / count

    check(case[0].removesuffix(".loss"), loss, GOLDEN["grpo.logps"], mean)
