"""Small models of every generation and rows of tokens; each program is compiled once for all tests of a module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.state import State
from tests.golden import QUICK
from tests.models.parameters import SMALL, in_dtype, merge, random_params

ROWS, TIME = 4, 20
TOKENS = np.random.default_rng(0).integers(0, 41, (ROWS, TIME)).astype(np.int32)
FLOAT32 = {name: dataclasses.replace(config, dtype="float32") for name, config in SMALL.items()}

# The previews differ from 5.2 in shapes only, which test_modules.py looks at each time; RWKV-7 with ROSA has parts that
# are looked at alone; RWKV-7a is a part of 7b, and rc00 has less of the same kind, held against its equations.
_PARTS = ("5.0", "5.1", "7-rosa", "7a", "8-rc00")
every_generation = pytest.mark.parametrize(
    "generation",
    [pytest.param(name, marks=pytest.mark.long) if name in _PARTS else name for name in SMALL],
)
every_class = pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])


@functools.cache
def streams(config: ModelConfig) -> Callable[..., tuple[Array, Array, State]]:
    """(params, inputs_embeds) -> every layer's hidden states, logits, state; nothing else is given.

    Of a model with tables by token they are the vectors of TOKENS.
    """

    def call(params: Any, inputs_embeds: Array) -> tuple[Array, Array, State]:
        model = merge(config, params)
        tokens = jnp.asarray(TOKENS[: len(inputs_embeds), : inputs_embeds.shape[1]]) if model.reads_tokens else None
        hidden, state = model.residual_stream(tokens, inputs_embeds=inputs_embeds)
        return hidden, model.logits(model.ln_out(hidden[-1])), state

    return jax.jit(call, compiler_options=QUICK)


@functools.cache
def token_program(config: ModelConfig) -> Callable[..., tuple[Array, State]]:
    """(params, tokens [B, 1], state) -> logits, state."""
    return jax.jit(lambda params, tokens, state: merge(config, params)(tokens, state), compiler_options=QUICK)


@functools.cache
def rows_program(config: ModelConfig) -> Callable[..., tuple[Array, State]]:
    """(params, tokens [B, T], state, segment_ids, lengths) -> logits, state."""

    def call(params: Any, tokens: Array, state: State, segment_ids: Array, lengths: Array) -> tuple[Array, State]:
        return merge(config, params)(tokens, state, segment_ids=segment_ids, lengths=lengths)

    return jax.jit(call, compiler_options=QUICK)


def run_rows(
    generation: str,
    tokens: NDArray = TOKENS,
    state: State | None = None,
    segment_ids: NDArray | None = None,
    lengths: Any = TIME,
) -> tuple[NDArray, State]:
    """Logits and states of the small model with random parameters, in float64."""
    config = SMALL[generation]
    state = empty_state(config) if state is None else state
    segments = np.zeros_like(tokens) if segment_ids is None else segment_ids
    ends = np.broadcast_to(np.asarray(lengths, np.int32), (ROWS,))
    return jax.device_get(rows_program(config)(random_params(config), tokens, state, segments, ends))


def empty_state(config: ModelConfig) -> State:
    return merge(config, random_params(config)).initial_state(ROWS)


@functools.cache
def one_by_one(generation: str) -> tuple[NDArray, list[State]]:
    """Logits [B, T, V] token by token, and the states before each token and after the last."""
    config = SMALL[generation]
    states, logits = [empty_state(config)], []
    for token in TOKENS.T:
        one, state = token_program(config)(random_params(config), token[:, None], states[-1])
        logits.append(one)
        states.append(state)
    return np.concatenate(logits, axis=1), jax.device_get(states)


def segments_of(*lengths: int) -> NDArray:
    """Ids that neither rise nor begin at zero, and come again."""
    assert sum(lengths) == TIME
    return np.repeat(np.array([7, 2, 7, 0][: len(lengths)], np.int32), lengths)


PACKED = ((7, 1, 12), (20,), (3, 16, 1), (9, 5, 2, 4))


def small_float32(generation: str) -> Any:
    config = FLOAT32[generation]
    return merge(config, in_dtype(random_params(config), config))
