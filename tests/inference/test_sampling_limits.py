"""At the limits of the settings, and of float32, there is always a token left to draw, and never a banned one."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.inference.sampling.choose import bias_array, choose, choose_together, no_occurrences, stack_settings
from rwkv_jax.inference.sampling.params import Order, SamplingParams
from tests.golden import QUICK

VOCAB_SIZE = 300
"""More than are drawn from at a time."""
LIKELIEST, TYPICAL = 270, range(100, 140)


def logits_of_one_likely_and_many_typical_tokens() -> NDArray[np.float32]:
    """The likeliest token has half of the probability, and says much less than the mean; each of 40 says about that."""
    probabilities = np.full(VOCAB_SIZE, 1e-9)
    probabilities[LIKELIEST] = 0.5
    probabilities[list(TYPICAL)] = 0.5 / len(TYPICAL)
    return np.log(probabilities).astype(np.float32)


@functools.cache
def _compiled(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


def drawn(
    logits: NDArray[np.float32], sampling: SamplingParams, *, times: int = 64, function: Any = choose
) -> NDArray[np.int32]:
    """Tokens [times] of draws from the same logits [V]."""
    bias = bias_array(sampling, np.ones(VOCAB_SIZE, np.bool_))
    rows = [np.tile(x, (times, 1)) for x in (logits, no_occurrences(VOCAB_SIZE), bias)]
    keys = jax.vmap(jax.random.key)(np.arange(times, dtype=np.uint32))
    return np.asarray(_compiled(function)(*rows, stack_settings([sampling] * times), keys))


@pytest.mark.parametrize("function", [choose, choose_together])
@pytest.mark.parametrize("typical_p", [0.3, 0.1, 1e-30, 1e-44, 1e-300])
@pytest.mark.parametrize("temperature", [1.0, 0.02, 0.01, 1e-3, 1e-30])
def test_without_the_likeliest_the_others_are_drawn_at_any_temperature(
    temperature: float, typical_p: float, function: Any
) -> None:
    sampling = SamplingParams(order="rwkv", temperature=temperature, typical_p=typical_p, banned=[0])
    tokens = drawn(logits_of_one_likely_and_many_typical_tokens(), sampling, function=function)
    assert set(tokens.tolist()) <= set(TYPICAL)
    assert len(set(tokens.tolist())) > len(TYPICAL) // 2


@pytest.mark.parametrize("order", ["openai", "rwkv"])
@pytest.mark.parametrize("typical_p", [1e-37, 1e-44, 1e-300])
def test_the_most_typical_tokens_are_kept_however_small_typical_p(order: Order, typical_p: float) -> None:
    tokens = drawn(logits_of_one_likely_and_many_typical_tokens(), SamplingParams(typical_p=typical_p, order=order))
    assert set(tokens.tolist()) <= set(TYPICAL)
    assert len(set(tokens.tolist())) > len(TYPICAL) // 2


LOGITS: dict[str, NDArray[np.float32]] = {
    "one likely and many typical": logits_of_one_likely_and_many_typical_tokens(),
    "all alike": np.zeros(VOCAB_SIZE, np.float32),
    "normal": np.random.default_rng(0).normal(0, 3, VOCAB_SIZE).astype(np.float32),
    "far apart": np.linspace(-1e9, 1e9, VOCAB_SIZE, dtype=np.float32),
    "further apart than float32 has powers": np.linspace(0, -120, VOCAB_SIZE, dtype=np.float32),
    "too near to zero for float32": np.linspace(-1e-44, 1e-44, VOCAB_SIZE).astype(np.float32),
    "all but two impossible": np.where(np.isin(np.arange(VOCAB_SIZE), (7, 299)), 0, -np.inf).astype(np.float32),
}

EXTREMES: dict[str, tuple[float, ...]] = {
    "temperature": (1e-300, 1e-44, 1e-37, 1e-3, 1.0, 1e9),
    "top_p": (1.0, 1e-44),
    "top_k": (0, 1, 2**31 - 1),
    "min_p": (0.0, 1e-44, 1.0),
    "typical_p": (1.0, 0.9, 0.1, 1e-300),
}


@pytest.mark.parametrize("order", ["openai", "rwkv"])
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_what_is_impossible_is_never_drawn(logits: NDArray[np.float32], order: Order) -> None:
    banned = [0, 1, 255, 256]
    rows = [
        SamplingParams(**dict(zip(EXTREMES, values, strict=True)), order=order, banned=banned)  # pyright: ignore[reportArgumentType]
        for values in itertools.product(*EXTREMES.values())
    ]
    bias = bias_array(rows[0], np.ones(VOCAB_SIZE, np.bool_))
    tables = [np.tile(x, (len(rows), 1)) for x in (logits, no_occurrences(VOCAB_SIZE), bias)]
    keys = jax.vmap(jax.random.key)(np.arange(len(rows), dtype=np.uint32))
    tokens = np.asarray(_compiled(choose_together)(*tables, stack_settings(rows), keys))
    wrong = [row for row, token in zip(rows, tokens, strict=True) if np.isneginf((logits + bias)[token])]
    assert not wrong
