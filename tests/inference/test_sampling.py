"""Sampling draws from exactly the tokens it should, as often as it should; settings are not compiled in."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.sampling import Sampling, sample

DRAWS = 20_000


def expected(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probability of each token, written down token by token: temperature, then top-k, then top-p of what is left."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    kept = order[:top_k] if top_k else order
    total, nucleus = 0.0, []
    for token in kept:
        if total >= top_p:
            break
        nucleus.append(token)
        total += weights[token] / weights[kept].sum()
    probabilities = np.zeros(len(logits))
    probabilities[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return probabilities


def draw(logits: np.ndarray, sampling: Sampling, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    settings = (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), jnp.int32(sampling.top_k))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    return np.asarray(jax.jit(sample)(rows, jax.random.key(seed), *settings))


LOGITS = np.random.default_rng(0).normal(0, 2, 12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.5, 0), (1e-6, 0), (1.0, 4), (0.7, 6), (1.0, 99)])
def test_tokens_and_frequencies_are_those_of_the_definition(temperature: float, top_p: float, top_k: int) -> None:
    probabilities = expected(LOGITS, temperature, top_p, top_k)
    counts = np.bincount(draw(LOGITS, Sampling(temperature, top_p, top_k)), minlength=len(LOGITS))
    assert not counts[probabilities == 0].any()
    likely = probabilities * DRAWS > 20
    assert counts[likely].all()
    # Chi-square: its mean is the number of terms and its variance twice that; six deviations away is no chance.
    terms = (counts[likely] - probabilities[likely] * DRAWS) ** 2 / (probabilities[likely] * DRAWS)
    assert terms.sum() < len(terms) + 6 * math.sqrt(2 * len(terms))


def test_temperature_zero_takes_the_likeliest_whatever_the_rest() -> None:
    drawn = draw(LOGITS, Sampling(0.0, top_p=0.9, top_k=5), draws=50)
    assert set(drawn.tolist()) == {int(LOGITS.argmax())}


def test_top_k_of_one_is_greedy() -> None:
    drawn = draw(LOGITS, Sampling(2.0, top_k=1), draws=50)
    assert set(drawn.tolist()) == {int(LOGITS.argmax())}


def test_tokens_as_likely_as_the_last_kept_are_kept_too() -> None:
    drawn = draw(np.array([1.0, 3.0, 3.0, 3.0, 0.0]), Sampling(top_k=2), draws=500)
    assert set(drawn.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(top_k=3), Sampling(temperature=0.0)])
def test_tokens_that_are_ruled_out_are_never_drawn(sampling: Sampling) -> None:
    logits = np.where(np.arange(12) % 2, LOGITS, -np.inf)
    drawn = draw(logits, sampling, draws=2000)
    assert all(token % 2 for token in drawn)


def test_rows_are_drawn_by_their_own_logits() -> None:
    rows = jnp.where(jnp.eye(6, dtype=bool), 50.0, 0.0)
    settings = (jnp.float32(1), jnp.float32(1), jnp.int32(0))
    drawn = sample(rows, jax.random.key(0), *settings)
    assert drawn.dtype == jnp.int32
    assert drawn.tolist() == [0, 1, 2, 3, 4, 5]


def test_other_settings_do_not_compile_again() -> None:
    traced = []

    @jax.jit
    def compiled(*arguments: Array) -> Array:
        traced.append(True)
        return sample(*arguments)

    logits = jnp.asarray(LOGITS, jnp.float32)[None]
    for sampling in (Sampling(), Sampling(0.0), Sampling(0.3, 0.5, 7)):
        settings = (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), jnp.int32(sampling.top_k))
        compiled(logits, jax.random.key(0), *settings)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Sampling(**values)  # pyright: ignore[reportArgumentType]
