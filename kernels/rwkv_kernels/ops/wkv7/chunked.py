"""WKV-7 in chunks: matrix products within chunks, a recurrence between them, and a hand-written backward pass.

Within a chunk let c_t be the cumulative sum of log w and m its value at the middle row. Scaled by the decay from there,

    a~_t = a_t e^{c_{t-1} - m}    r~_t = r_t e^{c_t - m}    b~_t = b_t e^{m - c_t}    k~_t = k_t e^{m - c_t}
    S~   = S e^m

the decay disappears: S~ <- S~ (I + a~ b~^T) + v k~^T. Writing Z for the rows [SA; V], where SA_t = S_{t-1} a_t is
what each step removes, A = strict_tril(a~ [b~; k~]^T) and R = tril(r~ [b~; k~]^T), a chunk of C steps is

    SA = (I - A_b)^{-1} (a~ S~^T + A_k V)      Y = r~ S~^T + R Z      S_end = (S~ + Z^T [b~; k~]) e^{c_C - m}

The exponents stay within +-C/2 times the largest |log w|, which is at most e^{-1/2} in RWKV-7, and the decay is never
inverted: the initial state of each chunk is stored, and the backward pass recomputes the rest of the chunk from its
inputs. m cancels from every product, so it needs no gradient.

Sources: RWKV-7 (arXiv 2503.14456) for the recurrence; the compact form of products of (I + a b^T) is the WY
representation of Bischof and Van Loan (1987).

Inside the loops the state is [B, H, N, M], key axis first, so that no product contracts the second to last axis of its
left operand: XLA's CPU backend takes nearly twice the time for that (benchmarks/README.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels import chunking
from rwkv_kernels.arguments import broadcast_varying_axes, pad_time
from rwkv_kernels.chunking import transpose
from rwkv_kernels.decay_scaling import DecayScaling, cumulative_decay, nan_out_of_range
from rwkv_kernels.matmul import xla_matmul
from rwkv_kernels.ops.wkv7.chunk import inverse_by_doubling
from rwkv_kernels.precision import XLA, Precision
from rwkv_kernels.xla import chunk_loop
from rwkv_kernels.xla.linear_rule import with_backward

CHUNK_SIZE = 32
"""Default steps in a chunk; chosen by benchmarks/wkv_cpu.py --chunk-sizes."""


def log_decay_floor(chunk_size: int = CHUNK_SIZE) -> float:
    """Smallest log w that all tokens may have in float32 with chunks of this size: half of one then decays by e^-64."""
    return -64.0 / max(chunk_size // 2, 1)


class _Scaled(NamedTuple):
    """A chunk's vectors scaled by cumulative decay, and the scales."""

    queries: Array  # [B, H, 2C, N]: a~ above r~
    keys: Array  # [B, H, 2C, N]: b~ above k~
    scale_a: Array  # [B, H, C, N]: e^{c_{t-1} - m}
    scale_r: Array  # [B, H, C, N]: e^{c_t - m}
    scale_keys: Array  # [B, H, C, N]: e^{m - c_t}
    decay_in: Array  # [B, H, N, 1]: e^m, for the initial state
    decay_out: Array  # [B, H, N, 1]: e^{c_C - m}, for the final state


def _scale_by_cumulative_decay(
    r: Array, log_w: Array, k: Array, a: Array, b: Array, packing: chunking.Packing | None
) -> _Scaled:
    scaling = cumulative_decay(xla_matmul("full"), log_w, packing)
    # Added to all sums, since the backward pass may not read the state.
    scaling = DecayScaling(*(sums + nan_out_of_range(scaling, packing) for sums in scaling))
    scale_a = jnp.exp(scaling.from_middle - log_w)
    scale_r = jnp.exp(scaling.from_middle)
    scale_keys = jnp.exp(-scaling.from_middle)
    return _Scaled(
        queries=jnp.concatenate([a * scale_a, r * scale_r], axis=2),
        keys=jnp.concatenate([b * scale_keys, k * scale_keys], axis=2),
        scale_a=scale_a,
        scale_r=scale_r,
        scale_keys=scale_keys,
        decay_in=transpose(jnp.exp(scaling.log_decay_in)),
        decay_out=transpose(jnp.exp(scaling.log_decay_out)),
    )


class _Masks(NamedTuple):
    """Masks of a chunk, applied by `where`, since scores above the diagonal may overflow."""

    scores: Array | np.ndarray
    """[..., 2C, 2C]: rows a~ read earlier steps, rows r~ their own step too."""
    reads: Array | bool
    """[..., 2C, 1]: rows a~ and r~ that read the initial state."""
    writes: Array | bool
    """[..., 2C, 1]: rows b~ and k~ that the final state keeps."""
    keeps: Array | bool
    """[..., 1, 1]: the final state keeps the initial one."""
    packing: chunking.Packing | None
    """Masks for C rows, or None without segments."""


def _masks(size: int, local_segments: Array | None) -> _Masks:
    """Masks of a chunk, whose local segments (`chunking.local_segment_index`) are [B, C], or None."""
    earlier, own = np.tri(size, k=-1, dtype=bool), np.tri(size, dtype=bool)
    causal = np.block([[earlier, earlier], [own, own]])
    if local_segments is None:
        return _Masks(causal, True, True, True, None)
    packing = chunking.packing(local_segments[:, None, :, None])
    twice = functools.partial(jnp.concatenate, axis=-2)
    return _Masks(
        scores=jnp.tile(packing.same, (1, 1, 2, 2)) & causal[None, None],
        reads=twice([packing.reads, packing.reads]),
        writes=twice([packing.writes, packing.writes]),
        keeps=packing.keeps,
        packing=packing,
    )


def _where(mask: Array | np.ndarray | bool, x: Array) -> Array:
    return x if mask is True else chunking.masked(jnp.asarray(mask), x)


_SMALL_BLOCK = 8
"""Rows of the blocks that are inverted by sums of products instead of matrix products, whose calls would cost more."""


def _small_product(x: Array, y: Array) -> Array:
    """x @ y for a few rows and columns, as part of the element-wise operations around it."""
    return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)


def _inverse_of_small_blocks(triangle: Array, precision: lax.Precision) -> Array:
    """`inverse_of_identity_minus` but on GPUs: X_1 and X_2, joined by M_21, give [[X_1, 0], [X_2 M_21 X_1, X_2]]."""
    size = triangle.shape[-1]
    block = min(size, _SMALL_BLOCK)
    matmul = functools.partial(jnp.matmul, precision=precision)

    def part(row: int, column: int) -> Array:
        return triangle[..., row * block : (row + 1) * block, column * block : (column + 1) * block]

    small = inverse_by_doubling(_small_product, jnp.stack([part(i, i) for i in range(size // block)]))
    inverses = [small[i] for i in range(size // block)]
    while block < size:
        pairs = []
        for i in range(0, size // block, 2):
            first, second = inverses[i : i + 2]
            joined = matmul(matmul(second, part(i + 1, i)), first)
            upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
            pairs.append(jnp.concatenate([upper, jnp.concatenate([joined, second], axis=-1)], axis=-2))
        inverses, block = pairs, 2 * block
    return inverses[0]


def inverse_of_identity_minus(triangle: Array, precision: lax.Precision) -> Array:
    """(I - M)^{-1} for a strictly lower triangular M [..., C, C], C a power of two.

    Doubles the size of inverted diagonal blocks. Unlike the product (I + M)(I + M^2)(I + M^4)..., it does not lose
    precision if keys are aligned. GPUs multiply whole matrices, in fewer and larger operations. (libtpu 0.0.51 aborts
    on these in some programs, such as the step of RWKV-7 7.2B on v5p.)
    """
    by_blocks = functools.partial(_inverse_of_small_blocks, precision=precision)
    whole = functools.partial(inverse_by_doubling, functools.partial(jnp.matmul, precision=precision))
    return lax.platform_dependent(triangle, cuda=whole, rocm=whole, default=by_blocks)


class _ChunkResiduals(NamedTuple):
    """What the backward pass does not recompute, of all chunks."""

    states: Array  # [T / C, B, H, N, M]: the state at the start of each chunk
    writes: Array  # [T / C, B, H, 2C, M]: Z of each chunk


Inputs = tuple[Array, ...]
"""r, log_w, k, v, a, b and the initial state."""


class _Chunked:
    """Forward and hand-written backward pass over whole chunks."""

    def __init__(self, size: int, precision: Precision) -> None:
        self._size = size
        self._matmul = functools.partial(jnp.matmul, precision=XLA[precision])
        self._matmul_transposed = functools.partial(jnp.einsum, "bhim,bhjm->bhij", precision=XLA[precision])
        self._inverse = functools.partial(inverse_of_identity_minus, precision=XLA[precision])

    def _masks(self, local_segments: Array | None, index: Array) -> _Masks:
        if local_segments is not None:
            local_segments = lax.dynamic_slice_in_dim(local_segments, index * self._size, self._size, axis=1)
        return _masks(self._size, local_segments)

    def _forward(
        self, local_segments: Array | None, inputs: Inputs, with_residuals: bool
    ) -> tuple[tuple[Array, Array], _ChunkResiduals | None]:
        r, log_w, k, v, a, b, state = inputs
        batch, time, heads, key_dim = r.shape
        size, value_dim, dtype = self._size, v.shape[-1], state.dtype
        matmul = self._matmul

        def body(index: Array, carry: tuple[Array, Array, _ChunkResiduals | None]) -> Any:
            state, y, residuals = carry
            r_, log_w_, k_, v_, a_, b_ = (chunk_loop.take(x, index, size, dtype) for x in (r, log_w, k, v, a, b))
            masks = self._masks(local_segments, index)
            scaled = _scale_by_cumulative_decay(r_, log_w_, k_, a_, b_, masks.packing)
            keys_transposed = transpose(scaled.keys)
            scores = _where(masks.scores, matmul(scaled.queries, keys_transposed))
            scaled_state = state * scaled.decay_in
            read = _where(masks.reads, matmul(scaled.queries, scaled_state))
            wanted = read[:, :, :size] + matmul(scores[:, :, :size, size:], v_)
            removed = matmul(self._inverse(scores[:, :, :size, :size]), wanted)
            writes = jnp.concatenate([removed, v_], axis=2)
            y = chunk_loop.put(y, read[:, :, size:] + matmul(scores[:, :, size:], writes), index)
            if residuals is not None:
                residuals = _ChunkResiduals(
                    lax.dynamic_update_index_in_dim(residuals.states, state, index, 0),
                    lax.dynamic_update_index_in_dim(residuals.writes, writes, index, 0),
                )
            kept = _where(masks.keeps, scaled_state) + matmul(keys_transposed, _where(masks.writes, writes))
            return kept * scaled.decay_out, y, residuals

        residuals = None
        if with_residuals:
            residuals = _ChunkResiduals(
                jnp.zeros((time // size, batch, heads, key_dim, value_dim), dtype),
                jnp.zeros((time // size, batch, heads, 2 * size, value_dim), dtype),
            )
        y = jnp.zeros((batch, time, heads, value_dim), dtype)
        _, y, residuals = broadcast_varying_axes(state, y, residuals)
        state, y, residuals = lax.fori_loop(0, time // size, body, (transpose(state), y, residuals))
        return (y, transpose(state)), residuals

    def forward(self, local_segments: Array | None, *inputs: Array) -> tuple[Array, Array]:
        """y and the final state."""
        return self._forward(local_segments, inputs, with_residuals=False)[0]

    def forward_with_residuals(
        self, local_segments: Array | None, *inputs: Array
    ) -> tuple[tuple[Array, Array], tuple[Array, _ChunkResiduals]]:
        """Also the residuals: the final state and those of the chunks."""
        (y, final), residuals = self._forward(local_segments, inputs, with_residuals=True)
        y, final, residuals = checkpoint_name((y, final, residuals), "wkv")
        return (y, final), (final, residuals)

    def backward(
        self,
        local_segments: Array | None,
        inputs: Inputs,
        residuals: tuple[Array, _ChunkResiduals],
        cotangents: tuple[Array, Array],
    ) -> Inputs:
        """The derivative of the chunk equations in the module's docstring, last chunk first.

        With dP = [dRHS; dY], the cotangents of what rows a~ and r~ read, the cotangents of all scores are one product:
        dScores = mask * (dP Z^T). The decay's gradient comes from how often each row's scale is used: a~ up to the
        step before its own, r~ up to its own, b~ and k~ with the opposite sign, and the chunk's end once for the state
        it leaves.
        """
        (r, log_w, k, v, a, b, _), (final, chunks) = inputs, residuals
        dy, dstate = cotangents
        dtype, size, last = final.dtype, self._size, r.shape[1] // self._size - 1
        matmul, matmul_transposed = self._matmul, self._matmul_transposed

        def body(backwards: Array, carry: tuple[Array, Array, tuple[Array, ...]]) -> Any:
            dstate, next_state, gradients = carry
            index = last - backwards
            r_, log_w_, k_, a_, b_, dy_ = (chunk_loop.take(x, index, size, dtype) for x in (r, log_w, k, a, b, dy))
            state, writes = chunks.states[index], chunks.writes[index]
            masks = self._masks(local_segments, index)
            scaled = _scale_by_cumulative_decay(r_, log_w_, k_, a_, b_, masks.packing)
            queries_transposed = transpose(scaled.queries)
            scores_transposed = _where(masks.scores.swapaxes(-1, -2), matmul(scaled.keys, queries_transposed))
            scaled_state = state * scaled.decay_in

            dscaled_end = dstate * scaled.decay_out
            dwrites = _where(masks.writes, matmul(scaled.keys, dscaled_end))
            dremoved = dwrites[:, :, :size] + matmul(scores_transposed[:, :, :size, size:], dy_)
            inverse = self._inverse(transpose(scores_transposed[:, :, :size, :size]))
            dwanted = matmul(transpose(inverse), dremoved)
            dread = jnp.concatenate([dwanted, dy_], axis=2)
            dv = dwrites[:, :, size:] + matmul(scores_transposed[:, :, size:], dread)
            dscores = matmul_transposed(dread, writes)
            dscores = dscores * chunking.with_ndim(jnp.asarray(masks.scores, dtype), dscores.ndim)
            dread_state, kept_writes = _where(masks.reads, dread), _where(masks.writes, writes)
            dqueries = matmul(dscores, scaled.keys) + matmul_transposed(dread_state, scaled_state)
            dkeys = matmul(transpose(dscores), scaled.queries) + matmul_transposed(kept_writes, dscaled_end)
            dscaled_state = _where(masks.keeps, dscaled_end) + matmul(queries_transposed, dread_state)

            from_queries, from_keys = scaled.queries * dqueries, scaled.keys * dkeys
            from_a = from_queries[:, :, :size]
            from_rows = from_a + from_queries[:, :, size:] - from_keys[:, :, :size] - from_keys[:, :, size:]
            from_end = jnp.sum(dstate * next_state, axis=-1)[:, :, None]
            later: Array | np.ndarray = np.tri(size, dtype=bool).T
            if masks.packing is not None:
                later = jnp.asarray(later)[None, None] & masks.packing.same
                from_end = jnp.where(masks.packing.writes, from_end, 0)
            dlog_w = xla_matmul("full").masked_sum(jnp.asarray(later), from_rows) + from_end - from_a

            dr, da = dqueries[:, :, size:] * scaled.scale_r, dqueries[:, :, :size] * scaled.scale_a
            db, dk = dkeys[:, :, :size] * scaled.scale_keys, dkeys[:, :, size:] * scaled.scale_keys
            gradients = tuple(
                chunk_loop.put(whole, part, index)
                for whole, part in zip(gradients, (dr, dlog_w, dk, dv, da, db), strict=True)
            )
            return dscaled_state * scaled.decay_in, state, gradients

        gradients = tuple(jnp.zeros_like(x) for x in (r, log_w, k, v, a, b))
        carry = (transpose(dstate), transpose(final), gradients)
        dstate, _, gradients = lax.fori_loop(0, last + 1, body, carry)
        return (*gradients, transpose(dstate))


def wkv7_chunked(
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
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence, chunk by chunk, with a hand-written backward pass.

    Args:
      r, log_w, k, a, b: [B, T, H, N]; v: [B, T, H, M]; any floating dtype, any T from 1.
      state: [B, H, M, N] in the dtype of the recurrence.
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      precision: of matrix products.
      chunk_size: steps in a chunk, a power of two; a sequence shorter than that is one chunk.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state. If log w is so far below the model's minimum, -e^{-1/2},
      that half a chunk leaves the dtype's range (float32: below `log_decay_floor(chunk_size)` for all tokens), they are
      NaN.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    time = r.shape[1]
    size = chunking.fitting_size(chunk_size, time)
    # Steps of zeros change nothing: no decay (log w = 0), nothing removed, nothing written.
    padded = (pad_time(x, -time % size) for x in (r, log_w, k, v, a, b))
    local_segments = chunking.local_segment_index(segments, -time % size, size)
    form = _Chunked(size, precision)
    run = with_backward(form.forward, form.forward_with_residuals, form.backward)
    y, state = run(local_segments, *padded, state)
    return y[:, :time], state
