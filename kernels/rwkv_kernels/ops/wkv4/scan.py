"""WKV-4 as the recurrence that defines it: one `lax.scan` over time, differentiated by JAX.

All other implementations are compared with this one in float64.

The state of a channel is a weighted sum of values and the sum of the weights, A = numerator * e^max_exponent and
B = denominator * e^max_exponent, with a common exponent so that e^k never overflows. Many choices of the three numbers
represent the same A and B.

The exponent rule, kept by all implementations: code that uses a state may depend on A and B only. The final
max_exponent is then a constant in differentiation: its cotangent is ignored, and gradients of anything that depends on
A and B alone are exact. The gradient of the initial max_exponent is numerator * dnumerator + denominator *
ddenominator, as A and B depend on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import is_active, segment_starts

State = tuple[Array, Array, Array]
"""Numerator, denominator and max_exponent, each [B, C]."""

EMPTY_EXPONENT = -1e38
"""The max_exponent of the empty state: finite in float32, and negligible beside any key."""


def empty_state(batch: int, channels: int, dtype: jnp.dtype) -> State:
    """The state before the first token."""
    zeros = jnp.zeros((batch, channels), dtype)
    return zeros, zeros, jnp.full_like(zeros, EMPTY_EXPONENT)


def freeze_exponent(state: State) -> State:
    """The same state with a constant exponent; its gradient goes through numerator and denominator."""
    numerator, denominator, exponent = state
    fixed = lax.stop_gradient(exponent)
    shift = jnp.exp(exponent - fixed)
    return numerator * shift, denominator * shift, fixed


def read(state: State, u: Array, k: Array, v: Array) -> Array:
    """y = (A + e^{u+k} v) / (B + e^{u+k}), with the bonus u for the current token; all [..., C].

    The larger of two exponents is rounded; subtracting that same rounded number, and adding u last, keeps its rounding
    error out of y. `update` does the same: otherwise a decay near 1 would be lost beside a large key.
    """
    numerator, denominator, exponent = state
    largest = lax.stop_gradient(jnp.maximum(u + k, exponent))
    past = jnp.exp(exponent - largest)
    present = jnp.exp(u + (k - largest))
    return (past * numerator + present * v) / (past * denominator + present)


def update(state: State, log_w: Array, k: Array, v: Array) -> State:
    """A <- w A + e^k v, B <- w B + e^k; all [..., C]."""
    numerator, denominator, exponent = state
    largest = lax.stop_gradient(jnp.maximum(log_w + exponent, k))
    past = jnp.exp(log_w + (exponent - largest))
    present = jnp.exp(k - largest)
    return past * numerator + present * v, past * denominator + present, largest


def step(state: State, log_w: Array, u: Array, k: Array, v: Array) -> tuple[State, Array]:
    """One token of WKV-4 for every row and channel.

    RWKV-4 (arXiv 2305.13048): a mean of all values so far, weighted by e^key and a decay per channel.

    Args:
      state: numerator, denominator and max_exponent [B, C].
      log_w, u: [C]; k, v: [B, C]; all of the state's dtype.

    Returns:
      The next state and y [B, C], which is read before the update.
    """
    state = freeze_exponent(state)
    return update(state, log_w[None], k, v), read(state, u[None], k, v)


def wkv4_scan(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, State]:
    """WKV-4 over a sequence, token by token.

    Args:
      log_w, u: [C]; k, v: [B, T, C]; any floating dtype; finite also beyond a row's length.
      state: numerator, denominator and max_exponent [B, C] in the dtype of the recurrence.
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      lengths: int32 [B] or None; steps beyond leave the state as it was and read zero.

    Returns:
      y [B, T, C] in the state's dtype, and the final state.
    """
    dtype = state[0].dtype
    log_w, u = log_w.astype(dtype)[None], u.astype(dtype)[None]  # [1, C]
    empty = empty_state(k.shape[0], k.shape[2], dtype)

    def body(carry: State, token: tuple[Array | None, Array | None, Array, Array]) -> tuple[State, Array]:
        restart, active, k, v = token
        k, v = k.astype(dtype), v.astype(dtype)
        if restart is not None:
            carry = select(restart[:, None], empty, carry)
        y, following = read(carry, u, k, v), update(carry, log_w, k, v)
        if active is not None:
            y, following = jnp.where(active[:, None], y, 0), select(active[:, None], following, carry)
        return following, y

    restarts = None if segments is None else segment_starts(segments)
    active = None if lengths is None else is_active(lengths, k.shape[1])
    time_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (restarts, active, k, v))
    state, y = lax.scan(body, freeze_exponent(state), time_first)
    return y.swapaxes(0, 1), state


def select(condition: Array, state: State, otherwise: State) -> State:
    """Chooses between two states, element-wise."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), state, otherwise)
