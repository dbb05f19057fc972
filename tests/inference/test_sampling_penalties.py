"""Penalties, biases and bans change logits as their definitions say."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer
from rwkv_jax.inference.sampling.choose import (
    bias_array,
    count,
    initial_occurrences,
    no_occurrences,
    occurrence_weights,
    stack_settings,
)
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.drawing import DRAWS, LOGITS, agrees, compiled, draw, expected


class OfficialPenalties:
    """What the loop of the official `rwkv` package does to logits, with its dictionary of occurrences."""

    def __init__(self, presence: float, frequency: float, decay: float) -> None:
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.occurrence: dict[int, float] = {}

    def apply(self, logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        for token, times in self.occurrence.items():
            logits[token] -= self.presence + times * self.frequency
        return logits

    def add(self, token: int, weight: float) -> None:
        for known in self.occurrence:
            self.occurrence[known] *= self.decay
        self.occurrence[token] = self.occurrence.get(token, 0) + weight


def test_a_sequence_is_that_of_the_official_penalties() -> None:
    """Greedy, so that each token depends on all penalties before it; the logits are close, so that they decide."""
    rng = np.random.default_rng(3)
    sampling = SamplingParams.rwkv(temperature=0.0)
    weights = np.where(np.arange(40) % 4, 1, 0).astype(np.float32)
    official = OfficialPenalties(0.2, 0.2, 0.996)
    occurrences = jnp.asarray(no_occurrences(40)[None])
    zero, settings = jnp.zeros((1, 40)), stack_settings([sampling])
    keys = jax.random.split(jax.random.key(0), 1)
    counted = jax.jit(count)
    tokens, unpenalized = [], []
    for logits in rng.normal(0, 0.5, (200, 40)).astype(np.float32):
        wanted = int(official.apply(logits).argmax())
        token = compiled()(logits[None], occurrences, zero, settings, keys)
        assert int(token[0]) == wanted
        official.add(wanted, float(weights[wanted]))
        occurrences = counted(occurrences, token, settings, weights)
        tokens.append(wanted)
        unpenalized.append(int(logits.argmax()))
    assert tokens != unpenalized
    known = np.array([official.occurrence.get(token, -1) for token in range(40)])
    np.testing.assert_allclose(occurrences[0], known, rtol=1e-5)
    assert any(value == 0 for value in official.occurrence.values())  # weightless ones have occurred

    prompted = initial_occurrences(dataclasses.replace(sampling, penalize_prompt=True), tokens, weights)
    np.testing.assert_allclose(prompted, known, rtol=1e-5)
    np.testing.assert_array_equal(initial_occurrences(sampling, tokens, weights), no_occurrences(40))


def test_repetition_presence_and_frequency_in_the_openai_order() -> None:
    """Every token weighs 1; positive logits are divided and negative ones multiplied before anything is subtracted."""
    sampling = SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.25, penalize_prompt=True, temperature=0.7
    )
    weights = np.zeros(12, np.float32)
    occurrences = initial_occurrences(sampling, [7, 6, 6, 2, 6], weights)
    assert occurrences.tolist() == [-1, -1, 1, -1, -1, -1, 3, 1, -1, -1, -1, -1]
    logits = np.where(np.arange(12) == 2, -0.5, LOGITS)
    penalized = logits.copy()
    for token, times in ((7, 1), (6, 3), (2, 1)):
        logit = penalized[token] / 1.5 if penalized[token] > 0 else penalized[token] * 1.5
        penalized[token] = logit - 0.3 - 0.25 * times
    bias = np.linspace(3, -1, 12)
    rows = [sampling] * DRAWS
    assert agrees(draw(logits, rows, occurrences=occurrences, bias=bias), expected(penalized + bias, sampling))
    assert not agrees(draw(logits, rows, bias=bias), expected(penalized + bias, sampling))


def test_rows_that_penalize_nothing_count_nothing() -> None:
    occurrences = jnp.asarray([[-1.0, 2.0, 0.5]] * 2)
    settings = stack_settings(
        [SamplingParams(penalty_decay=0.5), SamplingParams(frequency_penalty=0.1, penalty_decay=0.5)]
    )
    after = count(occurrences, jnp.array([0, 0]), settings, jnp.ones(3))
    assert after.tolist() == [[-1.0, 2.0, 0.5], [1.0, 1.0, 0.25]]


def test_digits_and_white_space_weigh_nothing() -> None:
    tokenizer = WorldTokenizer()
    weights = occurrence_weights(tokenizer, tokenizer.vocab_size)
    assert weights.dtype == np.float32
    for text, weight in ((" ", 0), ("\t", 0), ("7", 0), ("\n", 1), ("a", 1), (" a", 1), ("-", 1), ("  ", 1)):
        (token,) = tokenizer.encode(text)
        assert weights[token] == weight, text
    assert weights[tokenizer.end_of_text] == 1
    assert weights[65535] == 1
    assert occurrence_weights(ByteTokenizer(), 300)[[48, 57, 32, 65, 200, 299]].tolist() == [0, 0, 0, 1, 1, 1]


def test_bias_bans_and_ids_without_a_name() -> None:
    named = np.array([True, True, False, True])
    bias = bias_array(SamplingParams(logit_bias={3: 1.5, 0: -2}, banned=(1,)), named)
    assert bias.dtype == np.float32
    assert bias.tolist() == [-2, -math.inf, -math.inf, 1.5]
    with pytest.raises(ConfigError, match="banned names 3 ids, and leaves no token"):
        bias_array(SamplingParams(banned=(0, 1, 3)), named)
    with pytest.raises(ConfigError, match="banned names id 4: the model's ids are 0 to 3"):
        bias_array(SamplingParams(banned=(4,)), named)
