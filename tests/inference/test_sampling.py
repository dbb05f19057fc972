"""Each setting keeps the tokens that its definition says, as often as it says; rows do not feel each other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.inference.sampling.choose import (
    bias_array,
    choose,
    choose_together,
    count,
    logprobs,
    no_occurrences,
    stack_settings,
    top_logprobs,
)
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.drawing import DRAWS, LOGITS, agrees, compiled, draw, expected, softmax

SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 99},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.6},
    {"typical_p": 0.95},
    {"typical_p": 1e-6},
    {"top_p": 0.7, "top_k": 6},
    {"top_k": 7, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
]


@pytest.mark.parametrize("order", ["openai", "rwkv"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_and_frequencies_are_those_of_the_definition(order: str, temperature: float) -> None:
    """All settings beside each other, in one call."""
    samplings = [SamplingParams(temperature=temperature, order=order, **values) for values in SETTINGS]  # pyright: ignore[reportArgumentType]
    tokens = draw(LOGITS, [sampling for sampling in samplings for _ in range(DRAWS)]).reshape(-1, DRAWS)
    for sampling, drawn in zip(samplings, tokens, strict=True):
        assert agrees(drawn, expected(LOGITS, sampling)), sampling


def test_the_orders_differ() -> None:
    """What the test above relies on."""
    settings: dict[str, Any] = {"temperature": 1.7, "top_p": 0.7}
    openai, rwkv = (expected(LOGITS, SamplingParams(order=order, **settings)) for order in ("openai", "rwkv"))
    assert (openai > 0).sum() != (rwkv > 0).sum()


@pytest.mark.parametrize("order", ["openai", "rwkv"])
def test_large_vocabularies_keep_the_tokens_of_the_definition(order: str) -> None:
    """Logits with many orders of magnitude between probabilities, over several blocks; exactly the same set."""
    logits = np.random.default_rng(1).normal(0, 2, 1000).astype(np.float32)
    sampling = SamplingParams(order=order, top_k=200, top_p=0.7)  # pyright: ignore[reportArgumentType]
    probabilities = expected(logits.astype(np.float64), sampling)
    assert 20 < (probabilities > 0).sum() < 200
    assert agrees(draw(logits, [sampling] * 20_000), probabilities)
    # A temperature that makes all that is kept equally likely shows each of them.
    hot = dataclasses.replace(sampling, temperature=1e6, order="rwkv")
    drawn = draw(logits, [hot] * DRAWS)
    assert set(drawn.tolist()) == set(np.flatnonzero(expected(logits.astype(np.float64), hot)).tolist())


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """One block has nearly all the probability, another, of equal tokens, a thousandth part of it."""
    logits = np.full(512, -np.inf)
    logits[0], logits[256:] = 0.0, math.log(0.001 / 256)
    tokens = draw(logits, [SamplingParams()] * 50_000)
    unlikely = tokens[tokens >= 256]
    assert 15 < len(unlikely) < 100
    assert len(set(unlikely.tolist())) > 0.7 * len(unlikely)


def test_temperature_zero_takes_the_likeliest_whatever_the_rest() -> None:
    for order in ("openai", "rwkv"):
        rows = [SamplingParams.greedy(top_p=0.9, top_k=5, typical_p=0.1, order=order)] * 20
        assert set(draw(LOGITS, rows).tolist()) == {int(LOGITS.argmax())}
    assert draw(np.array([1.0, 5.0, 5.0]), [SamplingParams.greedy()]).tolist() == [1]


def test_top_p_zero_is_greedy_as_in_the_rwkv_package() -> None:
    for sampling in (SamplingParams(top_p=0), SamplingParams.rwkv(top_p=0.0, temperature=3.0, typical_p=0.1)):
        assert set(draw(LOGITS, [sampling] * 20).tolist()) == {int(LOGITS.argmax())}
        assert draw(np.array([1.0, 5.0, 5.0]), [sampling]).tolist() == [1]  # the first of equals
    rows = [SamplingParams(top_p=0), SamplingParams(temperature=50.0)] * 200
    drawn = draw(LOGITS, rows)
    assert set(drawn[::2].tolist()) == {int(LOGITS.argmax())}
    assert len(set(drawn[1::2].tolist())) > 5  # others in the batch are drawn as they were


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 2}, {1, 2, 3}),
        ({"top_k": 1}, {1, 2, 3}),
        ({"top_p": 0.3}, {1, 2, 3}),
        ({"min_p": 1.0}, {1, 2, 3}),
        ({"typical_p": 0.3}, {1, 2, 3}),
        ({"top_k": 4, "temperature": 1e6}, {0, 1, 2, 3, 5}),
    ],
)
@pytest.mark.parametrize("order", ["openai", "rwkv"])
def test_tokens_as_likely_as_the_last_kept_are_kept_too(values: dict[str, Any], kept: set[int], order: Any) -> None:
    # Neighbors among the float32 are no ties.
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    logits = np.array([1.0, 3.0, 3.0, 3.0, below, 1.0])
    assert set(draw(logits, [SamplingParams(order=order, **values)] * 400).tolist()) == kept


def test_zeros_of_both_signs_tie() -> None:
    assert set(draw(np.array([0.0, -0.0, -1.0]), [SamplingParams(top_k=1)] * 100).tolist()) == {0, 1}


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), *(SamplingParams(**values) for values in SETTINGS), SamplingParams.rwkv()]
)
def test_tokens_that_are_ruled_out_are_never_drawn(sampling: SamplingParams) -> None:
    logits = np.where(np.arange(12) % 2, LOGITS, -np.inf)
    assert all(token % 2 for token in draw(logits, [sampling] * 500))
    assert all(token % 2 for token in draw(LOGITS, [sampling] * 500, bias=np.where(np.arange(12) % 2, 0, -np.inf)))
    only = np.where(np.arange(12) == 7, LOGITS, -np.inf)
    assert set(draw(only, [sampling] * 20).tolist()) == {7}


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3), SamplingParams(typical_p=0.5)]
)
def test_a_vocabulary_of_one(sampling: SamplingParams) -> None:
    assert draw(np.array([-3.0]), [sampling, SamplingParams.greedy()]).tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e9])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = np.array([1e9, -1e9, 1e9 - 1e4, -np.inf])
    for order in ("openai", "rwkv"):
        drawn = set(draw(logits, [SamplingParams(temperature=temperature, order=order)] * 200).tolist())
        # In the order "rwkv" the probabilities of the others have become 0 before the temperature applies.
        assert drawn == ({0, 1, 2} if temperature > 1 and order == "openai" else {0})
        assert set(draw(logits, [SamplingParams(temperature=temperature, typical_p=0.9)] * 50).tolist()) <= {0, 1, 2}


MIXED = [
    SamplingParams(),
    SamplingParams.greedy(),
    SamplingParams.rwkv(temperature=1.3),
    SamplingParams(top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.1),
    SamplingParams(top_p=0.3, order="rwkv"),
]


def test_rows_beside_each_other_get_what_they_get_alone() -> None:
    rng = np.random.default_rng(2)
    rows = MIXED * 4
    logits = rng.normal(0, 3, (len(rows), 300)).astype(np.float32)
    occurrences = np.where(rng.random(logits.shape) < 0.2, rng.integers(0, 5, logits.shape), -1).astype(np.float32)
    bias = np.zeros_like(logits)
    keys = jax.random.split(jax.random.key(1), len(rows))
    weights = np.ones(300, np.float32)
    together = compiled()(logits, occurrences, bias, stack_settings(rows), keys)
    counting = jax.jit(count)
    counted = counting(occurrences, together, stack_settings(rows), weights)
    at_once = jax.jit(choose_together)(logits, occurrences, bias, stack_settings(rows), keys)
    np.testing.assert_array_equal(at_once, together)
    for i, sampling in enumerate(rows):
        own = slice(i, i + 1)
        alone = compiled()(logits[own], occurrences[own], bias[own], stack_settings([sampling]), keys[own])
        assert alone.tolist() == together[own].tolist()
        after = counting(occurrences[own], alone, stack_settings([sampling]), weights)
        np.testing.assert_array_equal(after, counted[own])
    order = rng.permutation(len(rows))
    settings = stack_settings([rows[i] for i in order])
    shuffled = compiled()(logits[order], occurrences[order], bias[order], settings, keys[order])
    np.testing.assert_array_equal(shuffled, together[order])


def test_same_key_same_token_other_key_other_token() -> None:
    logits = np.zeros(1000)
    first, again, other = (draw(logits, [SamplingParams()] * 10, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 5  # rows have keys of their own


def test_other_settings_do_not_compile_again() -> None:
    traced = []

    @jax.jit
    def step(*arguments: Any) -> tuple[Array, Array]:
        traced.append(True)
        logits, occurrences, bias, settings, keys, weights = arguments
        tokens = choose(logits, occurrences, bias, settings, keys)
        return tokens, count(occurrences, tokens, settings, weights)

    logits = np.asarray(LOGITS, np.float32)[None]
    for sampling in [*MIXED, SamplingParams(logit_bias={3: 2.0}, banned=[4])]:
        bias = bias_array(sampling, np.ones(12, bool))[None]
        arguments = (
            logits,
            no_occurrences(12)[None],
            bias,
            stack_settings([sampling]),
            jax.random.split(jax.random.key(0), 1),
        )
        step(*arguments, np.ones(12, np.float32))
    assert len(traced) == 1


def test_logprobs_are_those_of_the_model() -> None:
    logits = np.stack([LOGITS, LOGITS[::-1]]).astype(np.float32)
    logits[1, 3] = -np.inf
    wanted = np.log(np.maximum([softmax(row) for row in logits.astype(np.float64)], 1e-300))
    of = logprobs(jnp.asarray(logits), jnp.array([4, 7]))
    np.testing.assert_allclose(of, [wanted[0, 4], wanted[1, 7]], rtol=1e-5)
    values, tokens = jax.jit(top_logprobs, static_argnums=1)(logits, 3)
    assert values.dtype == jnp.float32
    assert tokens.dtype == jnp.int32
    order = np.argsort(-wanted, axis=-1)[:, :3]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(values, np.take_along_axis(wanted, order, -1), rtol=1e-5)
