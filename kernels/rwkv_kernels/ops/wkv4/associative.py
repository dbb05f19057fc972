"""WKV-4 as an associative scan over time: of logarithmic depth, differentiated by JAX.

A span of tokens is an affine map of the state, given by whether it resets, its number of steps of decay, and the state
that it adds. Maps of adjacent spans compose to one of the same form, so `jax.lax.associative_scan` computes the state
after every token. A tree also accumulates less rounding than a loop.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import is_active, segment_starts
from rwkv_kernels.ops.wkv4.scan import State, empty_state, freeze_exponent, read, select


class _Span(NamedTuple):
    """A span of tokens as a map of the state, for every row (and channel)."""

    restarts: Array  # [B, T, 1]: the initial state is reset
    steps: Array  # [B, T, 1]: how many times the initial state decays
    state: State  # each [B, T, C]: the final state from the empty state


def wkv4_associative(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, State]:
    """WKV-4 over a sequence by an associative scan.

    Arguments and results are those of `wkv4_scan`.
    """
    dtype = state[0].dtype
    batch, time, channels = k.shape
    log_w, u, k, v = (x.astype(dtype) for x in (log_w, u, k, v))
    u = u[None, None]  # [1, 1, C]
    decay = jnp.maximum(log_w, -1e30)[None, None]  # 0 * -inf would be NaN
    restarts = jnp.zeros((batch, time), bool) if segments is None else segment_starts(segments)
    active = jnp.ones((batch, time), bool) if lengths is None else is_active(lengths, time)

    def join(first: _Span, second: _Span) -> _Span:
        numerator, denominator, exponent = first.state
        decayed = second.steps * decay
        largest = lax.stop_gradient(jnp.maximum(decayed + exponent, second.state[2]))
        past = jnp.exp(decayed + (exponent - largest))
        present = jnp.exp(second.state[2] - largest)
        joined = (past * numerator + present * second.state[0], past * denominator + present * second.state[1], largest)
        return _Span(
            first.restarts | second.restarts,
            first.steps + second.steps,
            select(second.restarts, second.state, joined),
        )

    empty = empty_state(batch, channels, dtype)
    key = lax.stop_gradient(k)
    weight = jnp.exp(k - key)
    token = select(active[..., None], (weight * v, weight, key), _over_time(empty))
    tokens = _Span(restarts[..., None], active[..., None].astype(dtype), token)
    nothing = jnp.zeros((batch, 1, 1), bool)
    start = _Span(nothing, nothing.astype(dtype), _over_time(freeze_exponent(state)))
    elements = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), start, tokens)
    # States before each token, and the final one at the end.
    numerator, denominator, exponent = lax.associative_scan(join, elements, axis=1).state
    before = numerator[:, :-1], denominator[:, :-1], exponent[:, :-1]
    if segments is not None:
        before = select(restarts[..., None], _over_time(empty), before)
    y = read(before, u, k, v)
    if lengths is not None:
        y = jnp.where(active[..., None], y, 0)
    return y, (numerator[:, -1], denominator[:, -1], exponent[:, -1])


def _over_time(state: State) -> State:
    """A state [B, C] as [B, 1, C]."""
    numerator, denominator, exponent = state
    return numerator[:, None], denominator[:, None], exponent[:, None]
