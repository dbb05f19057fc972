"""Small Transformers and Llamas on the same rows of tokens; each program is compiled once for all tests of a module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from tests.golden import QUICK
from tests.models.parameters import initial_params, merge, random_params

SMALL = ModelConfig(
    architecture="transformer",
    vocab_size=41,
    num_layers=3,
    width=32,
    head_dim=8,
    ffn_width=48,
    context_length=24,
    dtype="float64",
)
LLAMA = dataclasses.replace(
    SMALL,
    architecture="llama",
    attention_heads=6,
    kv_heads=2,
    rotary_base=100.0,
    rotary_scaling=(4.0, 1.0, 4.0, 32.0),
    qkv_bias=True,
    qk_norm=True,
    tied_head=True,
)
"""With all that a Llama or Qwen may have; heads wider than the residual stream."""
ROWS, TIME = 4, 20
TOKENS: Any = np.random.default_rng(0).integers(0, 41, (ROWS, TIME)).astype(np.int32)
FLOAT32 = dataclasses.replace(SMALL, dtype="float32", num_layers=2)
LLAMA_FLOAT32 = dataclasses.replace(LLAMA, dtype="float32", num_layers=2)


@functools.cache
def program(config: ModelConfig) -> Callable[..., tuple[Array, Any]]:
    """(params, tokens, state, segment_ids, lengths) -> logits, state."""

    def call(params: Any, tokens: Array, state: Any, segment_ids: Any, lengths: Any) -> tuple[Array, Any]:
        return merge(config, params)(tokens, state, segment_ids=segment_ids, lengths=lengths)

    return jax.jit(call, compiler_options=QUICK)


def run(
    tokens: NDArray, state: Any = None, segment_ids: Any = None, lengths: Any = None, *, config: ModelConfig = SMALL
) -> tuple[NDArray, Any]:
    """Logits and state of the small model with random parameters."""
    lengths = None if lengths is None else np.asarray(lengths, np.int32)
    return jax.device_get(program(config)(random_params(config), tokens, state, segment_ids, lengths))


def empty_state(config: ModelConfig = SMALL) -> Any:
    return merge(config, random_params(config)).initial_state(ROWS)


def alone(text: NDArray, config: ModelConfig = SMALL) -> tuple[NDArray, Any]:
    """Logits [T, V] and state of one text [T] by itself, in a row of one length for all."""
    row = np.zeros((1, 24), np.int32)
    row[0, : text.size] = text
    logits, state = run(row, None, None, [text.size], config=config)
    return logits[0, : text.size], state


def small_float32() -> Any:
    return merge(FLOAT32, initial_params(FLOAT32))
