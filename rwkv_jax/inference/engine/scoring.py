"""Log-probabilities of given tokens: the device's part, and what a caller gets.

Logits of V entries a token would fill the memory (128 MiB for 512 tokens at V = 65536), so they are made for a group of
tokens at a time, of which only the log-probabilities, the most likely tokens and the last token's logits are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.inference.engine.requests import TopLogprobs
from rwkv_jax.inference.sampling.choose import logprobs, top_logprobs

_MAX_LOGITS = 2**24
"""Logits in memory at a time: 256 tokens of 65536, 64 MiB."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of given tokens, by the model alone."""

    logprob: float
    """Their sum."""
    is_greedy: bool
    """Whether every token is the most likely one where it stands."""
    token_logprobs: tuple[float, ...]
    """Of each token, after all before it."""
    top: tuple[TopLogprobs, ...]
    """For each token, the most likely ones in its place; empty if none were asked for."""
    ids: tuple[int, ...]
    """The tokens."""
    is_argmax: tuple[bool, ...]
    """For each token, whether it is the most likely one."""


class TokenScores(NamedTuple):
    """Scores of r rows of T tokens; entries beyond a row's length are meaningless."""

    logprobs: Array | NDArray[Any]
    """[r, T], float32, or float64 in a float64 model."""
    is_argmax: Array | NDArray[Any]
    """bool [r, T]."""
    top_tokens: Array | NDArray[Any]
    """int32 [r, T, n]."""
    top_logprobs: Array | NDArray[Any]
    """[r, T, n]."""


def score_tokens(
    logits_of: Callable[[Array], Array], hidden: Array, before: Array, tokens: Array, lengths: Array, num_top: int
) -> TokenScores:
    """Scores each token by the logits that precede it.

    Args:
      logits_of: from hidden vectors [g, C] to logits [g, V]; called for groups of tokens.
      hidden: [r, T, C], of which [:, t] follows token t.
      before: logits [r, V] that precede token 0.
      tokens: int32 [r, T], of which each row's first `lengths` [r] are valid.
      num_top: number of most likely tokens, n, at most V.
    """
    rows, length, _ = hidden.shape
    first = _scored(before, tokens[:, 0], num_top)
    if length == 1:
        return jax.tree.map(lambda x: x[:, None], first)
    size = min(rows * (length - 1), max(1, _MAX_LOGITS // before.shape[-1]))
    num_groups = -(-rows * (length - 1) // size)
    # Valid ones first, so that groups of padding are left out.
    is_valid = rearrange(jnp.arange(1, length) < lengths[:, None], "r t -> (r t)")
    order = jnp.argsort(~is_valid, stable=True)
    order = jnp.pad(order, (0, num_groups * size - len(order)), constant_values=rows * (length - 1))
    vectors = rearrange(hidden[:, :-1], "r t C -> (r t) C")
    targets = rearrange(tokens[:, 1:], "r t -> (r t)")

    def score_group(group: Array, scores: TokenScores) -> TokenScores:
        own = jax.lax.dynamic_slice_in_dim(order, group * size, size)
        logits = logits_of(jnp.take(vectors, own, axis=0, mode="clip")).astype(before.dtype)
        found = _scored(logits, jnp.take(targets, own, mode="clip"), num_top)
        return jax.tree.map(lambda x, new: x.at[own].set(new, mode="drop"), scores, found)

    empty = jax.tree.map(lambda x: jnp.zeros((rows * (length - 1), *x.shape[1:]), x.dtype), first)
    rest = jax.lax.fori_loop(0, -(-jnp.sum(is_valid) // size), score_group, empty)
    return jax.tree.map(
        lambda x, y: jnp.concatenate([x[:, None], y.reshape(rows, length - 1, *y.shape[1:])], axis=1), first, rest
    )


def _scored(logits: Array, tokens: Array, num_top: int) -> TokenScores:
    """Scores of tokens [g] by logits [g, V]."""
    values, ids = top_logprobs(logits, num_top)
    return TokenScores(logprobs(logits, tokens), jnp.argmax(logits, axis=-1) == tokens, ids, values)


def join_scores(ids: Sequence[int], parts: Sequence[TokenScores]) -> Score:
    """The score of a text's tokens from those of its pieces, each without a row axis."""
    values = [float(value) for part in parts for value in part.logprobs]
    is_argmax = [bool(value) for part in parts for value in part.is_argmax]
    top = [
        tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        for part in parts
        for tokens, logprobs in zip(np.asarray(part.top_tokens), np.asarray(part.top_logprobs), strict=True)
    ]
    has_top = bool(parts) and parts[0].top_tokens.shape[-1] > 0
    return Score(
        math.fsum(values), all(is_argmax), tuple(values), tuple(top) if has_top else (), tuple(ids), tuple(is_argmax)
    )
