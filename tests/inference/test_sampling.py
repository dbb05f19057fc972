"""Each setting keeps the tokens that its definition says, as often as it says; rows do not feel each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer
from rwkv_jax.inference.sampling import (
    Sampling,
    bias_of,
    choose,
    choose_together,
    count,
    initial_occurrences,
    log_probabilities,
    no_occurrences,
    occurrence_weights,
    settings_of,
    top_log_probabilities,
)

DRAWS = 4000
LOGITS = np.random.default_rng(0).normal(0, 2, 12)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits[np.isfinite(logits)].max())
    return weights / weights.sum()


def smallest_set(badness: np.ndarray, probabilities: np.ndarray, mass: float) -> np.ndarray:
    """Whether a token is kept: the least bad ones until their probabilities reach the mass, and what ties with them."""
    if mass >= 1:
        return np.ones(len(badness), bool)
    total = 0.0
    for token in np.argsort(badness, kind="stable"):
        total += probabilities[token]
        if total >= mass:
            return badness <= badness[token]
    raise AssertionError(f"all tokens together have {total} < {mass}")


def renormalised(probabilities: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probability of each token, by the numbered steps of the module's docstring that follow the penalties."""
    in_top_k = np.ones(len(logits), bool)
    if sampling.top_k:
        in_top_k = logits >= np.sort(logits)[-min(sampling.top_k, len(logits))]
    if sampling.order == "openai":
        probabilities = renormalised(softmax(logits / sampling.temperature), in_top_k)
        kept = in_top_k & smallest_set(-probabilities, probabilities, sampling.top_p)
    else:
        probabilities = softmax(logits)
        kept = in_top_k & smallest_set(-probabilities, probabilities, sampling.top_p)
    kept &= probabilities >= sampling.min_p * probabilities.max()
    probabilities = renormalised(probabilities, kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(probabilities)
        distance = np.abs(surprise - np.nansum(probabilities * surprise))
    probabilities = renormalised(probabilities, kept & smallest_set(distance, probabilities, sampling.typical_p))
    if sampling.order == "rwkv":
        probabilities = probabilities ** (1 / sampling.temperature)
    return probabilities / probabilities.sum()


@functools.cache
def compiled() -> Any:
    return jax.jit(choose)


def draw(
    logits: np.ndarray,
    rows: Sequence[Sampling],
    seed: int = 0,
    occurrences: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """One token for each row, of logits [V]; rows and tokens are filled up, so that few programs serve all tests."""
    num_rows, size = DRAWS * -(-len(rows) // DRAWS), len(logits)
    width = size if size in (1, 12) else 12 if size < 12 else 1000

    def filled(values: np.ndarray, rest: float) -> np.ndarray:
        wide = np.concatenate([values, np.full(width - size, rest)]).astype(np.float32)
        return np.broadcast_to(wide, (DRAWS, width))

    arguments = (
        filled(logits, -np.inf),
        filled(no_occurrences(size) if occurrences is None else occurrences, -1),
        filled(np.zeros(size) if bias is None else bias, 0),
    )
    settings = settings_of([*rows, *[Sampling.greedy()] * (num_rows - len(rows))])
    keys = jax.random.split(jax.random.key(seed), num_rows)
    tokens = []
    for start in range(0, num_rows, DRAWS):
        own = slice(start, start + DRAWS)
        drawn = compiled()(*arguments, jax.tree.map(lambda x: x[own], settings), keys[own])  # noqa: B023  used at once
        assert drawn.dtype == jnp.int32
        tokens.append(drawn)
    return np.concatenate(tokens)[: len(rows)]


def agrees(tokens: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether no token without probability was drawn, and the others as often as chance allows."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return False
    likely = probabilities * len(tokens) > 8
    terms = (counts[likely] - probabilities[likely] * len(tokens)) ** 2 / (probabilities[likely] * len(tokens))
    # Chi-square: its mean is the number of terms and its variance twice that; six deviations away is no chance.
    return bool(terms.sum() < len(terms) + 6 * math.sqrt(2 * len(terms)))


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
    samplings = [Sampling(temperature=temperature, order=order, **values) for values in SETTINGS]  # pyright: ignore[reportArgumentType]
    tokens = draw(LOGITS, [sampling for sampling in samplings for _ in range(DRAWS)]).reshape(-1, DRAWS)
    for sampling, drawn in zip(samplings, tokens, strict=True):
        assert agrees(drawn, expected(LOGITS, sampling)), sampling


def test_the_orders_differ() -> None:
    """What the test above relies on."""
    settings: dict[str, Any] = {"temperature": 1.7, "top_p": 0.7}
    openai, rwkv = (expected(LOGITS, Sampling(order=order, **settings)) for order in ("openai", "rwkv"))
    assert (openai > 0).sum() != (rwkv > 0).sum()


@pytest.mark.parametrize("order", ["openai", "rwkv"])
def test_large_vocabularies_keep_the_tokens_of_the_definition(order: str) -> None:
    """Logits with many orders of magnitude between probabilities, over several blocks; exactly the same set."""
    logits = np.random.default_rng(1).normal(0, 2, 1000).astype(np.float32)
    sampling = Sampling(order=order, top_k=200, top_p=0.7)  # pyright: ignore[reportArgumentType]
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
    tokens = draw(logits, [Sampling()] * 50_000)
    unlikely = tokens[tokens >= 256]
    assert 15 < len(unlikely) < 100
    assert len(set(unlikely.tolist())) > 0.7 * len(unlikely)


def test_temperature_zero_takes_the_likeliest_whatever_the_rest() -> None:
    for order in ("openai", "rwkv"):
        rows = [Sampling.greedy(top_p=0.9, top_k=5, typical_p=0.1, order=order)] * 20
        assert set(draw(LOGITS, rows).tolist()) == {int(LOGITS.argmax())}
    assert draw(np.array([1.0, 5.0, 5.0]), [Sampling.greedy()]).tolist() == [1]


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
    # Neighbours among the float32 are no ties.
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    logits = np.array([1.0, 3.0, 3.0, 3.0, below, 1.0])
    assert set(draw(logits, [Sampling(order=order, **values)] * 400).tolist()) == kept


def test_zeros_of_both_signs_tie() -> None:
    assert set(draw(np.array([0.0, -0.0, -1.0]), [Sampling(top_k=1)] * 100).tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [Sampling(), *(Sampling(**values) for values in SETTINGS), Sampling.rwkv()])
def test_tokens_that_are_ruled_out_are_never_drawn(sampling: Sampling) -> None:
    logits = np.where(np.arange(12) % 2, LOGITS, -np.inf)
    assert all(token % 2 for token in draw(logits, [sampling] * 500))
    assert all(token % 2 for token in draw(LOGITS, [sampling] * 500, bias=np.where(np.arange(12) % 2, 0, -np.inf)))
    only = np.where(np.arange(12) == 7, LOGITS, -np.inf)
    assert set(draw(only, [sampling] * 20).tolist()) == {7}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(top_k=3), Sampling(typical_p=0.5)])
def test_a_vocabulary_of_one(sampling: Sampling) -> None:
    assert draw(np.array([-3.0]), [sampling, Sampling.greedy()]).tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e9])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = np.array([1e9, -1e9, 1e9 - 1e4, -np.inf])
    for order in ("openai", "rwkv"):
        drawn = set(draw(logits, [Sampling(temperature=temperature, order=order)] * 200).tolist())
        # In the order "rwkv" the probabilities of the others have become 0 before the temperature applies.
        assert drawn == ({0, 1, 2} if temperature > 1 and order == "openai" else {0})
        assert set(draw(logits, [Sampling(temperature=temperature, typical_p=0.9)] * 50).tolist()) <= {0, 1, 2}


MIXED = [
    Sampling(),
    Sampling.greedy(),
    Sampling.rwkv(temperature=1.3),
    Sampling(top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9),
    Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.1),
    Sampling(top_p=0.3, order="rwkv"),
]


def test_rows_beside_each_other_get_what_they_get_alone() -> None:
    rng = np.random.default_rng(2)
    rows = MIXED * 4
    logits = rng.normal(0, 3, (len(rows), 300)).astype(np.float32)
    occurrences = np.where(rng.random(logits.shape) < 0.2, rng.integers(0, 5, logits.shape), -1).astype(np.float32)
    bias = np.zeros_like(logits)
    keys = jax.random.split(jax.random.key(1), len(rows))
    weights = np.ones(300, np.float32)
    together = compiled()(logits, occurrences, bias, settings_of(rows), keys)
    counting = jax.jit(count)
    counted = counting(occurrences, together, settings_of(rows), weights)
    at_once = jax.jit(choose_together)(logits, occurrences, bias, settings_of(rows), keys)
    np.testing.assert_array_equal(at_once, together)
    for i, sampling in enumerate(rows):
        own = slice(i, i + 1)
        alone = compiled()(logits[own], occurrences[own], bias[own], settings_of([sampling]), keys[own])
        assert alone.tolist() == together[own].tolist()
        after = counting(occurrences[own], alone, settings_of([sampling]), weights)
        np.testing.assert_array_equal(after, counted[own])
    order = rng.permutation(len(rows))
    settings = settings_of([rows[i] for i in order])
    shuffled = compiled()(logits[order], occurrences[order], bias[order], settings, keys[order])
    np.testing.assert_array_equal(shuffled, together[order])


def test_same_key_same_token_other_key_other_token() -> None:
    logits = np.zeros(1000)
    first, again, other = (draw(logits, [Sampling()] * 10, seed).tolist() for seed in (1, 1, 2))
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
    for sampling in [*MIXED, Sampling(logit_bias={3: 2.0}, banned=[4])]:
        bias = bias_of(sampling, np.ones(12, bool))[None]
        arguments = (
            logits,
            no_occurrences(12)[None],
            bias,
            settings_of([sampling]),
            jax.random.split(jax.random.key(0), 1),
        )
        step(*arguments, np.ones(12, np.float32))
    assert len(traced) == 1


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
    sampling = Sampling.rwkv(temperature=0.0)
    weights = np.where(np.arange(40) % 4, 1, 0).astype(np.float32)
    official = OfficialPenalties(0.2, 0.2, 0.996)
    occurrences = jnp.asarray(no_occurrences(40)[None])
    zero, settings = jnp.zeros((1, 40)), settings_of([sampling])
    keys = jax.random.split(jax.random.key(0), 1)
    counted = jax.jit(count)
    tokens, unpenalised = [], []
    for logits in rng.normal(0, 0.5, (200, 40)).astype(np.float32):
        wanted = int(official.apply(logits).argmax())
        token = compiled()(logits[None], occurrences, zero, settings, keys)
        assert int(token[0]) == wanted
        official.add(wanted, float(weights[wanted]))
        occurrences = counted(occurrences, token, settings, weights)
        tokens.append(wanted)
        unpenalised.append(int(logits.argmax()))
    assert tokens != unpenalised
    known = np.array([official.occurrence.get(token, -1) for token in range(40)])
    np.testing.assert_allclose(occurrences[0], known, rtol=1e-5)
    assert any(value == 0 for value in official.occurrence.values())  # weightless ones have occurred

    prompted = initial_occurrences(dataclasses.replace(sampling, penalise_prompt=True), tokens, weights)
    np.testing.assert_allclose(prompted, known, rtol=1e-5)
    np.testing.assert_array_equal(initial_occurrences(sampling, tokens, weights), no_occurrences(40))


def test_repetition_presence_and_frequency_in_the_openai_order() -> None:
    """Every token weighs 1; positive logits are divided and negative ones multiplied before anything is subtracted."""
    sampling = Sampling(
        repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.25, penalise_prompt=True, temperature=0.7
    )
    weights = np.zeros(12, np.float32)
    occurrences = initial_occurrences(sampling, [7, 6, 6, 2, 6], weights)
    assert occurrences.tolist() == [-1, -1, 1, -1, -1, -1, 3, 1, -1, -1, -1, -1]
    logits = np.where(np.arange(12) == 2, -0.5, LOGITS)
    penalised = logits.copy()
    for token, times in ((7, 1), (6, 3), (2, 1)):
        logit = penalised[token] / 1.5 if penalised[token] > 0 else penalised[token] * 1.5
        penalised[token] = logit - 0.3 - 0.25 * times
    bias = np.linspace(3, -1, 12)
    rows = [sampling] * DRAWS
    assert agrees(draw(logits, rows, occurrences=occurrences, bias=bias), expected(penalised + bias, sampling))
    assert not agrees(draw(logits, rows, bias=bias), expected(penalised + bias, sampling))


def test_rows_that_penalise_nothing_count_nothing() -> None:
    occurrences = jnp.asarray([[-1.0, 2.0, 0.5]] * 2)
    settings = settings_of([Sampling(penalty_decay=0.5), Sampling(frequency_penalty=0.1, penalty_decay=0.5)])
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
    bias = bias_of(Sampling(logit_bias={3: 1.5, 0: -2}, banned=(1,)), named)
    assert bias.dtype == np.float32
    assert bias.tolist() == [-2, -math.inf, -math.inf, 1.5]
    with pytest.raises(ConfigError, match="banned names 3 ids, and leaves no token"):
        bias_of(Sampling(banned=(0, 1, 3)), named)
    with pytest.raises(ConfigError, match="banned names id 4: the model's ids are 0 to 3"):
        bias_of(Sampling(banned=(4,)), named)


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = np.stack([LOGITS, LOGITS[::-1]]).astype(np.float32)
    logits[1, 3] = -np.inf
    wanted = np.log(np.maximum([softmax(row) for row in logits.astype(np.float64)], 1e-300))
    of = log_probabilities(jnp.asarray(logits), jnp.array([4, 7]))
    np.testing.assert_allclose(of, [wanted[0, 4], wanted[1, 7]], rtol=1e-5)
    values, tokens = jax.jit(top_log_probabilities, static_argnums=1)(logits, 3)
    assert values.dtype == jnp.float32
    assert tokens.dtype == jnp.int32
    order = np.argsort(-wanted, axis=-1)[:, :3]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(values, np.take_along_axis(wanted, order, -1), rtol=1e-5)


def test_presets() -> None:
    assert Sampling.openai() == Sampling() == Sampling(1.0, 1.0, 0)
    rwkv = Sampling.rwkv(top_k=5)
    assert (rwkv.order, rwkv.temperature, rwkv.top_p, rwkv.top_k) == ("rwkv", 1.0, 0.85, 5)
    assert (rwkv.presence_penalty, rwkv.frequency_penalty, rwkv.penalty_decay) == (0.2, 0.2, 0.996)
    assert Sampling.rwkv(top_p=0.5).top_p == 0.5
    assert Sampling.greedy().temperature == 0
    assert rwkv.penalises
    assert not Sampling().penalises


def test_settings_are_values() -> None:
    biases = {5: 1, 2: -1.0}
    sampling = Sampling(logit_bias=biases, banned=[7, 3, 7])
    biases[9] = 1
    assert sampling.logit_bias == ((2, -1.0), (5, 1.0))
    assert sampling.banned == (3, 7)
    same = Sampling(logit_bias=((2, -1.0), (5, 1.0)), banned=(3, 7))
    assert same == sampling == dataclasses.replace(sampling)
    assert len({sampling, same, Sampling()}) == 2
    sampling.check_ids(8)
    with pytest.raises(ConfigError, match="logit_bias names id 5: the model's ids are 0 to 4"):
        sampling.check_ids(5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be a number from 0 to"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"temperature": True}, "temperature = True"),
        ({"temperature": None}, "temperature = None"),
        ({"top_p": 0.0}, r"top_p = 0.0: must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.0}, "top_k = 2.0"),
        ({"top_k": 2**31}, "top_k = 2147483648"),
        ({"top_k": True}, "top_k = True"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.01}, "min_p = 1.01"),
        ({"typical_p": 0}, "typical_p = 0"),
        ({"typical_p": math.nan}, "typical_p = nan"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"presence_penalty": math.nan}, "presence_penalty = nan"),
        ({"presence_penalty": 1e10}, "presence_penalty = 1"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty = -inf"),
        ({"penalty_decay": 1.001}, "penalty_decay = 1.001"),
        ({"penalty_decay": -0.1}, "penalty_decay = -0.1"),
        ({"penalise_prompt": 1}, "penalise_prompt = 1"),
        ({"order": "vllm"}, "order = 'vllm': must be one of openai, rwkv"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of id 1 is nan"),
        ({"logit_bias": {1: -math.inf}}, "logit_bias of id 1 is -inf.*`banned` rules a token out"),
        ({"logit_bias": {1: "2"}}, "logit_bias of id 1 is '2'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names id -1"),
        ({"logit_bias": {"50256": 1.0}}, "logit_bias names id '50256'"),
        ({"logit_bias": 3}, "logit_bias = 3: must be a mapping"),
        ({"banned": [1.5]}, "banned names id 1.5"),
        ({"banned": [-1]}, "banned names id -1"),
        ({"banned": 5}, "banned = 5: must be a sequence"),
        ({"banned": "57"}, "banned = '57': must be a sequence"),
        ({"banned": [3, 4], "logit_bias": {4: 1.0}}, "banned and logit_bias both name id 4"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
