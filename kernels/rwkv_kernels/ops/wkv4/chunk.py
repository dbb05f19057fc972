"""Tokens of WKV-4, forward and backward, on values of any shape, in XLA and in kernels.

Write m and m' for the exponents before and after a token, and a and b for the numerator and denominator before it:

    read     y = (q a + p v) / (q b + p)      q : p = e^m : e^{u + k}, the larger of the two set to 1
    update   a' = f a + g v, b' = f b + g     f = e^{log_w + m - m'}, g = e^{k - m'}

By the exponent rule of scan.py exponents are constants in differentiation. With h = dy / (q b + p) and the cotangents
da', db' of the state after the token,

    da = f da' + q h      dv = g da' + p h                      dlog_w = f (a da' + b db')
    db = f db' - q h y    dk = g (v da' + db') + p h (v - y)    du = p h (v - y)

No factor exceeds 1, except by rounding, so nothing overflows; da and db follow a linear recurrence backward in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.ops.wkv4.scan import EMPTY_EXPONENT, State


class TokenFlags(NamedTuple):
    """Flags of tokens; None where they are the same for all."""

    restart: Array | None
    """The state is reset before the token."""
    active: Array | None
    """The token counts; otherwise the state is unchanged and y is zero."""


class Factors(NamedTuple):
    """Weights of the past and of the current token in a result."""

    past: Array
    present: Array


class Token(NamedTuple):
    """A token's inputs."""

    flags: TokenFlags
    k: Array
    v: Array


class Cotangents(NamedTuple):
    """Gradients of what a token depends on."""

    log_w: Array
    u: Array
    k: Array
    v: Array


def mix(factors: Factors, past: Array, present: Array | float) -> Array:
    """Weighted sum of past and current token."""
    return factors.past * past + factors.present * present


def reading(exponent: Array, u: Array, k: Array) -> Factors:
    """Factors q and p of a read."""
    distance = u + (k - exponent)
    is_nearer = distance > 0
    smaller = jnp.exp(jnp.where(is_nearer, -distance, distance))
    return Factors(jnp.where(is_nearer, smaller, 1), jnp.where(is_nearer, 1, smaller))


def updating(flags: TokenFlags, exponent: Array, log_w: Array, k: Array) -> tuple[Factors, Array]:
    """Factors f and g of an update, and the exponent after it.

    The new exponent is rounded; subtracting that same rounded number keeps its rounding error out of the factors.
    Otherwise a decay near 1 would be lost beside a large key. The larger factor is e to the rounding error x, 1 + x.
    """
    decayed = log_w + exponent
    following = lax.stop_gradient(jnp.maximum(decayed, k))
    past, present = log_w + (exponent - following), k - following
    is_older = decayed > k
    smaller = jnp.exp(jnp.where(is_older, present, past))
    factors = Factors(jnp.where(is_older, 1 + past, smaller), jnp.where(is_older, smaller, 1 + present))
    if flags.active is None:
        return factors, following
    kept = Factors(jnp.where(flags.active, factors.past, 1), jnp.where(flags.active, factors.present, 0))
    return kept, jnp.where(flags.active, following, exponent)


def restart(flags: TokenFlags, state: State) -> State:
    """The state before a token, reset where a segment starts."""
    if flags.restart is None:
        return state
    numerator, denominator, exponent = state
    return (
        jnp.where(flags.restart, 0, numerator),
        jnp.where(flags.restart, 0, denominator),
        jnp.where(flags.restart, EMPTY_EXPONENT, exponent),
    )


def read(flags: TokenFlags, state: State, u: Array, k: Array, v: Array) -> Array:
    """y of a token, from the state before it."""
    numerator, denominator, exponent = state
    factors = reading(exponent, u, k)
    y = mix(factors, numerator, v) / mix(factors, denominator, 1)
    return y if flags.active is None else jnp.where(flags.active, y, 0)


def advance(before: State, log_w: Array, token: Token) -> State:
    """The state after a token, from the state before it."""
    numerator, denominator, exponent = before
    factors, following = updating(token.flags, exponent, log_w, token.k)
    return mix(factors, numerator, token.v), mix(factors, denominator, 1), following


def backward(
    before: State, log_w: Array, u: Array, token: Token, dy: Array, later: tuple[Array, Array]
) -> tuple[Cotangents, tuple[Array, Array]]:
    """Cotangents of a token's inputs, and of the numerator and denominator before it.

    Args:
      before: the state before the token, after a reset.
      later: cotangents of the numerator and denominator after it.
    """
    (flags, k, v), (numerator, denominator, exponent), (dnumerator, ddenominator) = token, before, later
    to_read, (to_update, _) = reading(exponent, u, k), updating(flags, exponent, log_w, k)
    if flags.active is not None:
        dy = jnp.where(flags.active, dy, 0)
    norm = 1 / mix(to_read, denominator, 1)
    y = mix(to_read, numerator, v) * norm
    h = dy * norm
    past, present = to_read.past * h, to_read.present * h
    bonus = present * (v - y)
    dlog_w = to_update.past * (numerator * dnumerator + denominator * ddenominator)
    if flags.active is not None:
        dlog_w = jnp.where(flags.active, dlog_w, 0)
    dk = bonus + to_update.present * (v * dnumerator + ddenominator)
    dv = present + to_update.present * dnumerator
    earlier = to_update.past * dnumerator + past, to_update.past * ddenominator - past * y
    return Cotangents(dlog_w, bonus, dk, dv), earlier


def run_tokens(state: State, log_w: Array, u: Array, tokens: Sequence[Token]) -> tuple[State, list[Array]]:
    """Runs a few tokens: the state after them, and the y of each."""
    ys = []
    for token in tokens:
        state = restart(token.flags, state)
        ys.append(read(token.flags, state, u, token.k, token.v))
        state = advance(state, log_w, token)
    return state, ys


def run_tokens_backward(
    state: State, log_w: Array, u: Array, tokens: Sequence[Token], dys: Sequence[Array], later: tuple[Array, Array]
) -> tuple[list[Cotangents], tuple[Array, Array]]:
    """Cotangents of a few tokens' inputs, in order, and of the numerator and denominator before them.

    Args:
      state: before the first token.
      later: cotangents of the numerator and denominator after the last token.
    """
    befores = []
    for token in tokens:
        befores.append(restart(token.flags, state))
        state = advance(befores[-1], log_w, token)
    cotangents = []
    for token, before, dy in zip(reversed(tokens), reversed(befores), reversed(dys), strict=True):
        cotangent, later = backward(before, log_w, u, token, dy, later)
        cotangents.append(cotangent)
    return cotangents[::-1], later
