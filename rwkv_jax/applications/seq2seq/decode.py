"""Greedy decoding and beam search over a step with a state of constant size; batched, to be jitted.

A hypothesis y of n tokens, the end among them, is worth its log-probability over GNMT's length penalty
(arXiv 1609.08144, equation 14):

    worth(y) = log p(y) / ((5 + n) / 6)^alpha

Of each row's K hypotheses that go on, every step takes the K best continuations by one token other than the end, by
log-probability, as all have the same length; what the end makes of the K is kept with the K best finished ones. The
search stops once nothing that goes on can still be worth more than these. So it is exact with K at least the number of
texts shorter than the limit by one. Whatever has not ended at the limit does not count; every hypothesis may end there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.applications.seq2seq.config import END, START

Step = Callable[[Array, Any], tuple[Array, Any]]
"""From tokens [R] and a state, whose arrays are [L, R, ...], to log-probabilities [R, V] and the next state."""


class Beams(NamedTuple):
    """Hypotheses, from the best to the worst."""

    tokens: Array
    """[B, K, limit], zeros from the end on."""
    worth: Array
    """[B, K]; minus infinity if there are fewer."""


class _Search(NamedTuple):
    step: Array
    state: Any
    tokens: Array
    """[B, K, limit] of those that go on."""
    log_p: Array
    """[B, K]"""
    finished: Beams


def length_penalty(length: Any, alpha: float) -> Any:
    """((5 + length) / 6)^alpha."""
    return ((5 + length) / 6) ** alpha


def greedy(step: Step, state: Any, *, batch_size: int, limit: int) -> Array:
    """The likeliest token at each step, up to the end or `limit`: [B, limit], zeros from the end on."""

    def is_going(carry: Any) -> Array:
        at, _, _, _, has_ended = carry
        return (at < limit) & ~jnp.all(has_ended)

    def go(carry: Any) -> Any:
        at, state, last, tokens, has_ended = carry
        log_p, state = step(last, state)
        last = jnp.where(has_ended, END, jnp.argmax(_allowed(log_p), axis=-1)).astype(jnp.int32)
        return at + 1, state, last, tokens.at[:, at].set(last), has_ended | (last == END)

    start = jnp.full(batch_size, START, jnp.int32)
    tokens = jnp.full((batch_size, limit), END, jnp.int32)
    return jax.lax.while_loop(is_going, go, (0, state, start, tokens, jnp.zeros(batch_size, bool)))[3]


def beam_search(step: Step, state: Any, *, batch_size: int, limit: int, beam_size: int, alpha: float) -> Beams:
    """The best hypotheses that were found.

    Args:
      state: of B rows; arrays [L, B, ...]. `step` is called with B x K rows, of which K in turn are one row's.
      limit: most tokens, with the end.
      alpha: exponent of the length penalty, from 0.
    """
    rows = batch_size * beam_size
    nothing = jnp.full((batch_size, beam_size), -jnp.inf)

    def is_going(search: _Search) -> Array:
        # Log-probabilities only fall, and no penalty divides them by more than that of the limit.
        reachable = jnp.max(search.log_p, axis=1) / length_penalty(limit, alpha)
        return (search.step < limit) & jnp.any(reachable > jnp.min(search.finished.worth, axis=1))

    def go(search: _Search) -> _Search:
        at = search.step
        last = jnp.where(at == 0, START, search.tokens[:, :, jnp.maximum(at - 1, 0)])
        log_p, state = step(last.reshape(rows), search.state)
        scores = search.log_p[:, :, None] + _allowed(log_p).reshape(batch_size, beam_size, -1)  # [B, K, V]
        finished = _best(search.finished, search.tokens, scores[:, :, END] / length_penalty(at + 1, alpha))
        vocab_size = scores.shape[-1]
        going = scores.at[:, :, END].set(-jnp.inf).reshape(batch_size, -1)
        kept, index = jax.lax.top_k(going, beam_size)
        parent, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
        tokens = jnp.take_along_axis(search.tokens, parent[:, :, None], axis=1).at[:, :, at].set(token)
        source = (parent + beam_size * jnp.arange(batch_size)[:, None]).reshape(rows)
        return _Search(at + 1, jax.tree.map(lambda x: x[:, source], state), tokens, kept, finished)

    tokens = jnp.full((batch_size, beam_size, limit), END, jnp.int32)
    first = nothing.at[:, 0].set(0.0)  # all hypotheses are the same at first: one of them counts
    repeated = jax.tree.map(lambda x: jnp.repeat(x, beam_size, axis=1), state)
    begin = _Search(jnp.int32(0), repeated, tokens, first, Beams(tokens, nothing))
    return jax.lax.while_loop(is_going, go, begin).finished


def _allowed(log_p: Array) -> Array:
    """Log-probabilities in which the beginning of a target is none of its tokens."""
    return log_p.at[..., START].set(-jnp.inf)


def _best(finished: Beams, tokens: Array, worth: Array) -> Beams:
    """The best of those that had finished and of those that now have."""
    all_tokens = jnp.concatenate([finished.tokens, tokens], axis=1)
    kept, index = jax.lax.top_k(jnp.concatenate([finished.worth, worth], axis=1), worth.shape[1])
    return Beams(jnp.take_along_axis(all_tokens, index[:, :, None], axis=1), kept)
