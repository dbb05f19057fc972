"""Choice of the next token from logits, for all rows of a batch inside jit, in the orders of `SamplingParams`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rwkv_jax.checks import ConfigError
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.sampling.selection import draw, first_largest, largest_floor

_WEIGHTLESS = " \t0123456789"
"""Tokens whose text is a substring of this weigh 0 in the order "rwkv", as in the official package."""

_NEVER = -1.0
"""Marks a token that has not occurred; weightless ones that have occurred have 0."""


class Settings(NamedTuple):
    """Settings of rows, each [B], as array arguments of a program. Fields as in `SamplingParams`."""

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any
    typical_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    penalty_decay: Any
    rwkv_order: Any


def stack_settings(rows: Sequence[SamplingParams]) -> Settings:
    """NumPy arrays [B]: float32, but int32 for top_k and bool for rwkv_order."""
    rows = [dataclasses.replace(row, temperature=0.0, top_p=1.0) if row.top_p == 0 else row for row in rows]

    def column(name: str) -> np.ndarray:
        if name == "rwkv_order":
            return np.array([row.order == "rwkv" for row in rows], np.bool_)
        return np.array([getattr(row, name) for row in rows], np.int32 if name == "top_k" else np.float32)

    return Settings(*map(column, Settings._fields))


def bias_array(sampling: SamplingParams, is_named: np.ndarray) -> np.ndarray:
    """float32 [V] to add to logits: the bias, and -inf for banned tokens.

    Args:
      is_named: bool [V], whether the tokenizer has a text for an id; others are banned too, since they are untrained.

    Raises:
      ConfigError: an id beyond V, or no token is left.
    """
    sampling.check_ids(len(is_named))
    bias = np.where(is_named, np.float32(0), np.float32(-np.inf))
    for token, value in dict(sampling.logit_bias).items():
        bias[token] += value
    bias[list(sampling.banned)] = -np.inf
    if np.all(np.isneginf(bias)):
        raise ConfigError(f"banned names {len(sampling.banned)} ids, and leaves no token to choose; ban fewer")
    return bias


def occurrence_weights(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """float32 [V], weight of an occurrence of each token in the order "rwkv": 0 for parts of `_WEIGHTLESS`, else 1."""

    def weight(token: int) -> float:
        text = tokenizer.token_bytes(token).decode(errors="replace") if tokenizer.is_named(token) else ""
        # In the package end_of_text has a text, so that it counts; here it has none.
        return 0.0 if text and text in _WEIGHTLESS else 1.0

    return np.array([weight(token) for token in range(vocab_size)], np.float32)


def no_occurrences(vocab_size: int) -> np.ndarray:
    """Occurrences, float32 [V], of an empty text."""
    return np.full(vocab_size, _NEVER, np.float32)


def initial_occurrences(
    sampling: SamplingParams, prompt_ids: Sequence[int] | np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Occurrences, float32 [V], after a prompt: none unless the settings penalize its tokens, else as by `count`.

    Args:
      weights: float32 [V], of `occurrence_weights`.
    """
    occurrences = no_occurrences(len(weights))
    if not (sampling.penalize_prompt and sampling.penalizes):
        return occurrences
    ids = np.asarray(prompt_ids, np.int64)
    age = np.arange(len(ids))[::-1]
    sums = np.zeros(len(weights))
    np.add.at(sums, ids, (weights[ids] if sampling.order == "rwkv" else 1.0) * np.power(sampling.penalty_decay, age))
    occurrences[ids] = sums[ids]
    return occurrences


def count(occurrences: Array, tokens: Array, settings: Settings, weights: Array) -> Array:
    """Updates occurrences [B, V] with chosen tokens [B]; rows without penalties are unchanged.

    Args:
      weights: float32 [V], of `occurrence_weights`.
    """

    def counted() -> Array:
        weight = jnp.where(settings.rwkv_order, jnp.asarray(weights)[tokens], 1)[:, None]
        decayed = jnp.where(occurrences >= 0, occurrences * settings.penalty_decay[:, None], occurrences)
        is_chosen = jnp.arange(occurrences.shape[-1], dtype=jnp.int32)[None] == tokens[:, None]
        one_more = jnp.where(is_chosen, jnp.maximum(decayed, 0) + weight, decayed)
        return jnp.where(_penalizes(settings)[:, None], one_more, occurrences)

    return jax.lax.cond(jnp.any(_penalizes(settings)), counted, lambda: occurrences)


def choose(logits: Array, occurrences: Array, bias: Array, settings: Settings, keys: Array) -> Array:
    """Chooses the next token of each row, independently of other rows.

    Args:
      logits: float32 [B, V].
      occurrences: float32 [B, V], of `initial_occurrences` and `count`.
      bias: float32 [B, V], of `bias_array`.
      settings: arrays [B].
      keys: random keys [B]; unused in rows of temperature 0.

    Returns:
      int32 [B].
    """
    arguments = (logits, occurrences, bias, settings, keys)
    # On a CPU one row at a time stays in the cache for all passes; elsewhere all rows are processed together.
    return jax.lax.platform_dependent(*arguments, cpu=choose_one_by_one, default=choose_together)


def choose_one_by_one(*arguments: Any) -> Array:
    """`choose`, row by row."""

    def one(row: Any) -> Array:
        return choose_together(*jax.tree.map(lambda x: x[None], row))[0]

    return jax.lax.map(one, arguments)


def choose_together(logits: Array, occurrences: Array, bias: Array, settings: Settings, keys: Array) -> Array:
    """`choose`, for all rows at once; passes that no row needs are skipped."""
    adjusted = _penalized(logits, occurrences, settings) + bias
    most_likely = first_largest(adjusted)
    is_greedy = settings.temperature <= 0
    drawn = jax.lax.cond(jnp.all(is_greedy), lambda: most_likely, lambda: draw(_kept(adjusted, settings), keys))
    return jnp.where(is_greedy, most_likely, drawn)


def _penalizes(settings: Settings) -> Array:
    return (
        (settings.repetition_penalty != 1) | (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
    )  # fmt: skip


def _penalized(logits: Array, occurrences: Array, settings: Settings) -> Array:
    """Logits after the penalties."""
    repetition = settings.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    fall = settings.presence_penalty[:, None] + occurrences * settings.frequency_penalty[:, None]
    return jnp.where(occurrences >= 0, repeated - fall, logits)


def _kept(logits: Array, settings: Settings) -> Array:
    """Unnormalized probabilities after temperature, top-k, top-p, min-p and typical; float32 [B, V].

    A row with a finite logit keeps at least one token, and the most likely one has the weight 1.
    """
    top_k, top_p, typical_p = settings.top_k, settings.top_p, settings.typical_p
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
    is_rwkv = settings.rwkv_order[:, None]
    largest = jnp.max(logits, axis=-1, keepdims=True)

    # The largest becomes 0, so that dividing by temperature cannot overflow.
    relative = logits - largest
    scaled = jnp.where(is_rwkv, relative, relative / temperature)
    weights = jnp.exp(scaled)
    everything = jnp.full(top_k.shape, -jnp.inf, logits.dtype)

    def top_k_floor() -> Array:
        k = top_k.astype(jnp.float32)
        floor = largest_floor(lambda floor: _count(logits >= floor), k, -jnp.inf, largest[:, 0], lambda floor: 1.0)
        return jnp.where(top_k > 0, floor, everything)

    in_top_k = logits >= jax.lax.cond(jnp.any(top_k > 0), top_k_floor, lambda: everything)[:, None]

    def top_p_floor() -> Array:
        summed = jnp.where(is_rwkv | in_top_k, weights, 0)
        target = jnp.where(top_p < 1, top_p * jnp.sum(summed, axis=-1), 0)
        # A token between two floors weighs at least as much as the lower one.
        floor = largest_floor(lambda floor: _mass(summed, summed >= floor), target, 0.0, 1.0, lambda floor: floor)
        return jnp.where(top_p < 1, floor, everything)

    in_top_p = weights >= jax.lax.cond(jnp.any(top_p < 1), top_p_floor, lambda: everything)[:, None]
    kept = jnp.where(in_top_k & in_top_p & (weights >= settings.min_p[:, None]), weights, 0)

    def only_typical() -> Array:
        total = jnp.sum(kept, axis=-1, keepdims=True)
        # The surprise without log(total), which cancels in the difference to its mean. -inf * 0 is nan.
        surprise = jnp.where(kept > 0, -scaled, 0)
        mean = jnp.sum(kept * surprise, axis=-1, keepdims=True) / total
        typicality = jnp.where(kept > 0, -jnp.abs(surprise - mean), -jnp.inf)
        # An underflowing target would be reached without any token.
        target = jnp.maximum(jnp.where(typical_p < 1, typical_p * total[:, 0], 0), jnp.finfo(kept.dtype).tiny)
        floor = largest_floor(lambda floor: _mass(kept, typicality >= floor), target, -jnp.inf, 0.0, lambda floor: 0.0)
        left = jnp.where((typicality >= floor[:, None]) | (typical_p >= 1)[:, None], kept, 0)
        # The most likely token may have been dropped: rescale so that the largest remaining weight is 1.
        largest = jnp.max(jnp.where(left > 0, relative, -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(left > 0, jnp.exp((relative - largest) / temperature), 0)

    def all_of_them() -> Array:
        return jnp.where(is_rwkv & (kept > 0), jnp.exp(relative / temperature), kept)

    return jax.lax.cond(jnp.any(typical_p < 1), only_typical, all_of_them)


def _mass(weights: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, weights, 0), axis=-1)


def _count(where: Array) -> Array:
    return jnp.sum(where, axis=-1, dtype=jnp.float32)


def logprobs(logits: Array, tokens: Array) -> Array:
    """Logprobs, float32 [B], of tokens [B] under the unmodified distribution of logits [B, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: Array, n: int) -> tuple[Array, Array]:
    """The n most likely tokens under the unmodified distribution: logprobs, float32 [B, n], and ids, int32 [B, n]."""
    values, tokens = jax.lax.top_k(logits, n)
    return values - jax.nn.logsumexp(logits, axis=-1, keepdims=True), tokens
