"""WKV-7 in chunks: matrix products inside a chunk, a recurrence over chunks, and a backward pass of its own.

Within a chunk let c_t be the running sum of log w and m its value at the middle row. In the *gauge* of that row,

    a~_t = a_t e^{c_{t-1} - m}    r~_t = r_t e^{c_t - m}    b~_t = b_t e^{m - c_t}    k~_t = k_t e^{m - c_t}
    S~   = S e^m

the decay disappears: S~ <- S~ (I + a~ b~^T) + v k~^T. Writing Z for the rows [SA; V], where SA_t = S_{t-1} a_t is
what each step removes, A = strict_tril(a~ [b~; k~]^T) and R = tril(r~ [b~; k~]^T), a chunk of C steps is

    SA = (I - A_b)^{-1} (a~ S~^T + A_k V)      Y = r~ S~^T + R Z      S_end = (S~ + Z^T [b~; k~]) e^{c_C - m}

The exponents stay within +-C/2 times the largest |log w|, which is at most e^{-1/2} in RWKV-7, and the decay is never
inverted: states are stored where chunks begin, and the backward pass recomputes the rest of each chunk from its
inputs. The middle row cancels from every product, so it needs no gradient.

Sources: RWKV-7 (arXiv 2503.14456) for the recurrence; the compact form of products of (I + a b^T) is the WY
representation of Bischof and Van Loan (1987).

Inside the loops the state is held as [B, H, N, M], key axis first, so that no product contracts the second to last
axis of its left side: XLA's CPU backend needs nearly twice the time for that form (benchmarks/README.md).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

CHUNK_SIZE = 32
"""Default steps in a chunk; chosen by benchmarks/wkv7_cpu.py."""

LOG_DECAY_FLOOR = -4.0
"""Smallest log w that every token of the default chunk may have in float32: half a chunk of it is e^{-64}."""

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _matmul_transposed(x: Array, y: Array) -> Array:
    """x y^T over the last two axes."""
    return jnp.einsum("bhim,bhjm->bhij", x, y, precision=lax.Precision.HIGHEST)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _chunk(x: Array, index: Array | int, size: int, dtype: jnp.dtype) -> Array:
    """Steps [index * size, (index + 1) * size) of [B, T, H, N], as [B, H, C, N]."""
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1).swapaxes(1, 2).astype(dtype)


def _put_chunk(x: Array, chunk: Array, index: Array | int) -> Array:
    """Inverse of `_chunk`: writes [B, H, C, N] into [B, T, H, N]."""
    size = chunk.shape[2]
    return lax.dynamic_update_slice_in_dim(x, chunk.swapaxes(1, 2).astype(x.dtype), index * size, axis=1)


class _Gauge(NamedTuple):
    """A chunk's vectors with the decay absorbed, and the factors that did it."""

    queries: Array  # [B, H, 2C, N]: a~ above r~
    keys: Array  # [B, H, 2C, N]: b~ above k~
    scale_a: Array  # [B, H, C, N]: e^{c_{t-1} - m}
    scale_r: Array  # [B, H, C, N]: e^{c_t - m}
    scale_keys: Array  # [B, H, C, N]: e^{m - c_t}
    enter: Array  # [B, H, N, 1]: e^m, from the chunk's first state into the gauge
    leave: Array  # [B, H, N, 1]: e^{c_C - m}, from the gauge to the chunk's last state


def _to_gauge(r: Array, log_w: Array, k: Array, a: Array, b: Array) -> _Gauge:
    size = r.shape[2]
    # A triangular product: XLA's cumsum is quadratic in C on a CPU, and four times slower.
    ones = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), log_w.dtype)), (*r.shape[:2], size, size))
    total = _matmul(ones, log_w)
    middle, end = total[:, :, (size - 1) // 2, None], total[:, :, -1:]
    # NaN where a state of size 1 would lose digits to underflow in the gauge; else the loss would go unnoticed.
    limits = jnp.finfo(log_w.dtype)
    in_range = jnp.maximum(-middle, middle - end) <= math.log(limits.eps / limits.tiny)
    middle = jnp.where(in_range, middle, jnp.nan)
    scale_a = jnp.exp(total - log_w - middle)
    scale_r = jnp.exp(total - middle)
    scale_keys = jnp.exp(middle - total)
    return _Gauge(
        queries=jnp.concatenate([a * scale_a, r * scale_r], axis=2),
        keys=jnp.concatenate([b * scale_keys, k * scale_keys], axis=2),
        scale_a=scale_a,
        scale_r=scale_r,
        scale_keys=scale_keys,
        enter=_transpose(jnp.exp(middle)),
        leave=_transpose(jnp.exp(end - middle)),
    )


def _causal_mask(size: int) -> np.ndarray:
    """[2C, 2C]: rows a~ see earlier steps only, rows r~ see their own step too.

    For `where`, not for a product: scores above the diagonal overflow long before those below it.
    """
    earlier, own = np.tri(size, k=-1, dtype=bool), np.tri(size, dtype=bool)
    return np.block([[earlier, earlier], [own, own]])


def _inverse_of_identity_minus(triangle: Array) -> Array:
    """(I - M)^{-1} for a strictly triangular M [..., C, C], C a power of two; lower or upper.

    Doubles the size of the inverted diagonal blocks: X <- X + X M_off X. Unlike the product
    (I + M)(I + M^2)(I + M^4)..., it does not lose precision when keys are aligned.
    """
    size = triangle.shape[-1]
    row, column = np.indices((size, size))
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=triangle.dtype), triangle.shape)
    block = 1
    while block < size:
        joins = (row // (2 * block) == column // (2 * block)) & (row // block != column // block)
        off_diagonal = triangle * jnp.asarray(joins, triangle.dtype)
        step = off_diagonal if block == 1 else _matmul(_matmul(inverse, off_diagonal), inverse)
        inverse = inverse + step
        block *= 2
    return inverse


class _Trace(NamedTuple):
    """What the backward pass cannot recompute from one chunk's inputs."""

    states: Array  # [T / C, B, H, N, M]: the state at the start of each chunk
    writes: Array  # [T / C, B, H, 2C, M]: Z of each chunk


def _forward(
    r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array, size: int, with_trace: bool
) -> tuple[Array, Array, _Trace | None]:
    batch, time, heads, key_dim = r.shape
    value_dim, dtype = v.shape[-1], state.dtype
    chunks = time // size
    mask = _causal_mask(size)

    def body(index: Array, carry: tuple[Array, Array, _Trace | None]) -> tuple[Array, Array, _Trace | None]:
        state, y, trace = carry
        r_, log_w_, k_, v_, a_, b_ = (_chunk(x, index, size, dtype) for x in (r, log_w, k, v, a, b))
        gauge = _to_gauge(r_, log_w_, k_, a_, b_)
        keys_transposed = _transpose(gauge.keys)
        scores = jnp.where(mask, _matmul(gauge.queries, keys_transposed), 0)
        gauged = state * gauge.enter
        read = _matmul(gauge.queries, gauged)
        wanted = read[:, :, :size] + _matmul(scores[:, :, :size, size:], v_)
        removed = _matmul(_inverse_of_identity_minus(scores[:, :, :size, :size]), wanted)
        writes = jnp.concatenate([removed, v_], axis=2)
        y = _put_chunk(y, read[:, :, size:] + _matmul(scores[:, :, size:], writes), index)
        if trace is not None:
            trace = _Trace(
                lax.dynamic_update_index_in_dim(trace.states, state, index, 0),
                lax.dynamic_update_index_in_dim(trace.writes, writes, index, 0),
            )
        return (gauged + _matmul(keys_transposed, writes)) * gauge.leave, y, trace

    trace = None
    if with_trace:
        trace = _Trace(
            jnp.zeros((chunks, batch, heads, key_dim, value_dim), dtype),
            jnp.zeros((chunks, batch, heads, 2 * size, value_dim), dtype),
        )
    y = jnp.zeros((batch, time, heads, value_dim), dtype)
    state, y, trace = lax.fori_loop(0, chunks, body, (_transpose(state), y, trace))
    return y, _transpose(state), trace


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _wkv7_whole_chunks(
    r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array, size: int
) -> tuple[Array, Array]:
    y, state, _ = _forward(r, log_w, k, v, a, b, state, size, with_trace=False)
    return y, state


def _vjp_forward(
    r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array, size: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    y, final, trace = _forward(r, log_w, k, v, a, b, state, size, with_trace=True)
    assert trace is not None
    y, final, states, writes = checkpoint_name((y, final, trace.states, trace.writes), "wkv")
    return (y, final), (r, log_w, k, v, a, b, final, states, writes)


def _vjp_backward(size: int, saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    """The chunk equations of the module's docstring, differentiated by hand, last chunk first.

    With dP = [dRHS; dY], the cotangents of what rows a~ and r~ read, every score's cotangent is one product:
    dScores = mask * (dP Z^T). The decay's gradient comes from how often each row's scale is used: a~ up to the step
    before its own, r~ up to its own, b~ and k~ with the opposite sign, and the chunk's end once for the state it
    leaves.
    """
    r, log_w, k, v, a, b, final, states, all_writes = saved
    dy, dstate = cotangents
    dtype, chunks = final.dtype, r.shape[1] // size
    mask = _causal_mask(size)

    def body(backwards: Array, carry: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, Array, tuple[Array, ...]]:
        dstate, next_state, gradients = carry
        index = chunks - 1 - backwards
        r_, log_w_, k_, a_, b_, dy_ = (_chunk(x, index, size, dtype) for x in (r, log_w, k, a, b, dy))
        state, writes = states[index], all_writes[index]
        gauge = _to_gauge(r_, log_w_, k_, a_, b_)
        queries_transposed = _transpose(gauge.queries)
        scores_transposed = jnp.where(mask.T, _matmul(gauge.keys, queries_transposed), 0)
        gauged = state * gauge.enter

        dgauged_end = dstate * gauge.leave
        dwrites = _matmul(gauge.keys, dgauged_end)
        dremoved = dwrites[:, :, :size] + _matmul(scores_transposed[:, :, :size, size:], dy_)
        dwanted = _matmul(_inverse_of_identity_minus(scores_transposed[:, :, :size, :size]), dremoved)
        dread = jnp.concatenate([dwanted, dy_], axis=2)
        dv = dwrites[:, :, size:] + _matmul(scores_transposed[:, :, size:], dread)
        dscores = _matmul_transposed(dread, writes) * mask
        dqueries = _matmul(dscores, gauge.keys) + _matmul_transposed(dread, gauged)
        dkeys = _matmul(_transpose(dscores), gauge.queries) + _matmul_transposed(writes, dgauged_end)
        dstate_before = (dgauged_end + _matmul(queries_transposed, dread)) * gauge.enter

        from_queries, from_keys = gauge.queries * dqueries, gauge.keys * dkeys
        from_a = from_queries[:, :, :size]
        from_rows = from_a + from_queries[:, :, size:] - from_keys[:, :, :size] - from_keys[:, :, size:]
        from_end = jnp.sum(dstate * next_state, axis=-1)[:, :, None]
        later = jnp.broadcast_to(jnp.triu(jnp.ones((size, size), dtype)), (*r_.shape[:2], size, size))
        dlog_w = _matmul(later, from_rows) + from_end - from_a

        dr, da = dqueries[:, :, size:] * gauge.scale_r, dqueries[:, :, :size] * gauge.scale_a
        db, dk = dkeys[:, :, :size] * gauge.scale_keys, dkeys[:, :, size:] * gauge.scale_keys
        gradients = tuple(
            _put_chunk(whole, part, index) for whole, part in zip(gradients, (dr, dlog_w, dk, dv, da, db), strict=True)
        )
        return dstate_before, state, gradients

    gradients = tuple(jnp.zeros_like(x) for x in (r, log_w, k, v, a, b))
    carry = (_transpose(dstate), _transpose(final), gradients)
    dstate, _, gradients = lax.fori_loop(0, chunks, body, carry)
    return (*gradients, _transpose(dstate))


_wkv7_whole_chunks.defvjp(_vjp_forward, _vjp_backward)


def wkv7_chunked(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence, chunk by chunk, with its own backward pass.

    Args:
      r, log_w, k, a, b: [B, T, H, N]; v: [B, T, H, M]; any floating dtype, any T from 1.
      state: [B, H, M, N] in the dtype that the recurrence runs in.
      chunk_size: steps in a chunk, a power of two; a sequence shorter than that is one chunk.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state. Where log w lies so far below the model's floor of
      -e^{-1/2} that half a chunk of it nears the end of the dtype's range (float32: all tokens' below
      `LOG_DECAY_FLOOR`), they are NaN, not wrong.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size = {chunk_size}: must be a power of two")
    time = r.shape[1]
    size = min(chunk_size, 1 << (time - 1).bit_length())
    padding = -time % size
    if padding:
        # Steps of zeros change nothing: no decay (log w = 0), nothing removed, nothing written.
        r, log_w, k, v, a, b = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (r, log_w, k, v, a, b))
    outputs: tuple[Array, Array] = _wkv7_whole_chunks(r, log_w, k, v, a, b, state, size)
    return outputs[0][:, :time], outputs[1]
