"""WKV-7 as the recurrence that defines it: one `lax.scan` over time, differentiated by JAX.

All other implementations are compared with this one in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import segment_starts
from rwkv_kernels.precision import XLA, Precision


def step(
    state: Array, r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, precision: Precision = "full"
) -> tuple[Array, Array]:
    """One token of WKV-7 for every row and head.

    RWKV-7 (arXiv 2503.14456), the generalized delta rule: S <- S (diag(w) + a b^T) + v k^T, y = S r.

    Args:
      state: [B, H, M, N], S with the value axis first.
      r, log_w, k, a, b: [B, H, N]; v: [B, H, M]; all of the state's dtype.

    Returns:
      The next state [B, H, M, N] and y [B, H, M], which is read after the update.
    """
    removed = jnp.einsum("bhmn,bhn->bhm", state, a, precision=XLA[precision])
    state = state * jnp.exp(log_w)[:, :, None, :]
    state = state + removed[..., None] * b[:, :, None, :] + v[..., None] * k[:, :, None, :]
    return state, jnp.einsum("bhmn,bhn->bhm", state, r, precision=XLA[precision])


def wkv7_scan(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array,
    *,
    segments: Array | None = None,
    precision: Precision = "full",
) -> tuple[Array, Array]:
    """WKV-7 over a sequence, token by token.

    Args:
      r, log_w, k, a, b: [B, T, H, N]; v: [B, T, H, M]; any floating dtype.
      state: [B, H, M, N] in the dtype of the recurrence.
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      precision: of matrix products.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state.
    """

    def body(carry: Array, token: tuple[Array | None, tuple[Array, ...]]) -> tuple[Array, Array]:
        restart, vectors = token
        if restart is not None:
            carry = jnp.where(restart[:, None, None, None], 0, carry)
        r, log_w, k, v, a, b = (x.astype(carry.dtype) for x in vectors)
        return step(carry, r, log_w, k, v, a, b, precision)

    restarts = None if segments is None else segment_starts(segments)
    time_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (restarts, (r, log_w, k, v, a, b)))
    state, y = lax.scan(body, state, time_first)
    return y.swapaxes(0, 1), state
