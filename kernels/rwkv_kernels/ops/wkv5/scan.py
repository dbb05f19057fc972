"""WKV-5 as the recurrence that defines it: one `lax.scan` over time, differentiated by JAX.

All other implementations are compared with this one in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import is_active, segment_starts
from rwkv_kernels.precision import XLA, Precision


def step(
    state: Array, r: Array, log_w: Array, k: Array, v: Array, u: Array, precision: Precision = "full"
) -> tuple[Array, Array]:
    """One token of WKV-5 for every row and head.

    RWKV-5 (arXiv 2404.05892): y = (S + v (u k)^T) r, then S <- S diag(w) + v k^T.

    Args:
      state: [B, H, M, N], S with the value axis first.
      r, k: [B, H, N]; v: [B, H, M]; log_w, u: [H, N]; all of the state's dtype.

    Returns:
      The next state [B, H, M, N] and y [B, H, M], which is read before the update.
    """
    y = jnp.einsum("bhmn,bhn->bhm", state, r, precision=XLA[precision])
    y = y + jnp.sum(r * u[None] * k, axis=-1, keepdims=True) * v
    return state * jnp.exp(log_w)[None, :, None, :] + v[..., None] * k[:, :, None, :], y


def wkv5_scan(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    state: Array,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
    precision: Precision = "full",
) -> tuple[Array, Array]:
    """WKV-5 over a sequence, token by token.

    Args:
      r, k: [B, T, H, N]; v: [B, T, H, M]; log_w, u: [H, N]; any floating dtype.
      state: [B, H, M, N] in the dtype of the recurrence.
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      lengths: int32 [B] or None; r, k and v are zero beyond them.
      precision: of matrix products.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state.
    """
    log_w, u = log_w.astype(state.dtype), u.astype(state.dtype)

    def body(carry: Array, token: tuple[Array | None, Array | None, tuple[Array, ...]]) -> tuple[Array, Array]:
        restart, active, vectors = token
        if restart is not None:
            carry = jnp.where(restart[:, None, None, None], 0, carry)
        r, k, v = (x.astype(carry.dtype) for x in vectors)
        following, y = step(carry, r, log_w, k, v, u, precision)
        if active is not None:
            following = jnp.where(active[:, None, None, None], following, carry)
        return following, y

    restarts = None if segments is None else segment_starts(segments)
    active = None if lengths is None else is_active(lengths, r.shape[1])
    time_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (restarts, active, (r, k, v)))
    state, y = lax.scan(body, state, time_first)
    return y.swapaxes(0, 1), state
