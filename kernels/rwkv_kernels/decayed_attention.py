"""One chunk of WKV-5 and WKV-6: linear attention with a decay per channel, exact for any decay.

With y_t = (S_{t-1} + v_t (u k_t)^T) r_t and S_t = S_{t-1} diag(w_t) + v_t k_t^T, a chunk of C steps is

    Y = (r e^{before}) S^T + A V                 S_end = S diag(e^{total}) + V^T (k e^{after})
    A_ij = sum_n r_in k_jn e^{log w_{j+1} + ... + log w_{i-1}}  (j < i)        A_ii = r_i (u k_i)

where before_t and after_t are the sums of log w over the chunk's steps before and after t. With factors
e^{c_i} e^{-c_j}, A would be one matrix product, but strong decays overflow. Here A is built by doubling: among blocks
of s steps, the pairs with i in an odd block and j in the even block just before it have

    A_ij = (r_i e^{sum within i's block before i}) (k_j e^{sum within j's block after j})^T

whose exponents are never positive. Every pair belongs to exactly one s of 1, 2, 4, ..., C/2, so log2 C masked products
give all of A, and each exponent is a sum of at most C logarithms, not a difference of longer sums.

Only the last two axes matter, and there are no slices, gathers or array constants, so the same code runs in XLA
([B, H, C, N]) and in Pallas kernels ([C, N]).

Sources: RWKV-5 and 6 (arXiv 2404.05892); gated linear attention (arXiv 2312.06635) for the overflow and for sub-blocks
as the remedy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.chunking import Packing, masked, with_ndim
from rwkv_kernels.decay_scaling import cumulative_decay
from rwkv_kernels.matmul import Matmul

LARGEST_EXPONENT = 20.0
"""Limit of |sum of log w| over half a chunk, for decays to be mild; e^x has about x times the relative error of x."""

SMALLEST_LOG = -1e4
"""e to this power is 0 in every dtype; -inf would give NaN in sums written as matrix products."""


AttentionChunk = Callable[[Matmul, Array, Array, Array, Array, Array, Array, Packing | None], tuple[Array, Array]]
"""(matmul, state, r, log_w, k, v, u, packing) -> (next state, y), as `decayed_attention_chunk`."""


def _indices(size: int) -> tuple[Array, Array]:
    """Row and column numbers [C, C]."""
    return lax.broadcasted_iota(jnp.int32, (size, size), 0), lax.broadcasted_iota(jnp.int32, (size, size), 1)


def earlier_steps(size: int) -> Array:
    """[C, C]: step j is before step i."""
    row, column = _indices(size)
    return column < row


def later_steps(size: int) -> Array:
    """[C, C]: step j is after step i."""
    row, column = _indices(size)
    return column > row


def num_levels(size: int) -> int:
    """Doublings of the blocks of steps in a chunk."""
    return size.bit_length() - 1


def steps_to_border(size: int, level: int) -> Array:
    """[C, C]: step j is before i in i's block of 2^level steps if that is an odd one, or after it in an even one."""
    row, column = _indices(size)
    is_odd = (row >> level) & 1 == 1
    others = ((row ^ column) >> level == 0) & (row != column)  # of the same block
    return others & (is_odd ^ (column > row))  # Mosaic cannot choose between booleans


def pairs_across_border(size: int, level: int) -> Array:
    """[C, C]: i is in an odd block of 2^level steps, and j in the even one just before it."""
    row, column = _indices(size)
    return ((row ^ column) >> level == 1) & (column < row)


def decayed_scores(matmul: Matmul, r: Array, log_w: Array, k: Array, same: Array | None) -> Array:
    """A below the diagonal, [..., C, C]; zero elsewhere and between segments."""
    size = r.shape[-2]
    scores = jnp.zeros((*r.shape[:-1], size), r.dtype)
    for level in range(num_levels(size)):
        queries, keys = r, k
        if level:  # within blocks of one step there is nothing to sum
            decay = jnp.exp(matmul.masked_sum(steps_to_border(size, level), log_w))
            queries, keys = r * decay, k * decay
        scores = scores + masked(pairs_across_border(size, level), matmul.nt(queries, keys))
    return scores if same is None else masked(same, scores)


def with_bonus(scores: Array, r: Array, k: Array, u: Array) -> Array:
    """A with its diagonal, a step's own contribution."""
    row, column = _indices(r.shape[-2])
    return jnp.where(with_ndim(row == column, scores.ndim), jnp.sum(r * u * k, axis=-1, keepdims=True), scores)


def decayed_attention_chunk(
    matmul: Matmul,
    state: Array,
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    packing: Packing | None,
) -> tuple[Array, Array]:
    """A chunk of WKV-5 or WKV-6.

    Args:
      matmul: at some precision.
      state: [..., M, N]; r, k: [..., C, N]; v: [..., C, M], C a power of two; all float32 or float64.
      log_w: [..., C, N]; its leading axes may be 1 or absent where decays do not depend on the row.
      u: [..., 1, N], the bonus of a step's own key.
      packing: segments, or None.

    Returns:
      The next state [..., M, N] and y [..., C, M].
    """
    size = r.shape[-2]
    log_w = jnp.maximum(log_w, SMALLEST_LOG)
    scores = decayed_scores(matmul, r, log_w, k, None if packing is None else packing.same)
    queries = r * jnp.exp(matmul.masked_sum(earlier_steps(size), log_w))
    keys = k * jnp.exp(matmul.masked_sum(later_steps(size), log_w))
    kept = state * jnp.exp(jnp.sum(log_w, axis=-2, keepdims=True))
    if packing is not None:
        queries, keys = masked(packing.reads, queries), masked(packing.writes, keys)
        kept = masked(packing.keeps, kept)
    y = matmul.nt(queries, state, "z") + matmul.nn(with_bonus(scores, r, k, u), v, "yz")
    return kept + matmul.tn(v, keys, "x"), y


def mild_attention_chunk(
    matmul: Matmul,
    state: Array,
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    packing: Packing | None,
) -> tuple[Array, Array]:
    """`decayed_attention_chunk` for mild decays (`decay_is_mild`): one matrix product gives all of A."""
    scaling = cumulative_decay(matmul, log_w, packing)
    queries, keys = r * jnp.exp(scaling.from_middle - log_w), k * jnp.exp(-scaling.from_middle)
    scaled_state = state * jnp.exp(scaling.log_decay_in)
    read, kept_keys, earlier = matmul.nt(queries, scaled_state), keys, earlier_steps(r.shape[-2])
    if packing is not None:
        read, kept_keys = masked(packing.reads, read), masked(packing.writes, keys)
        scaled_state = masked(packing.keeps, scaled_state)
        earlier = with_ndim(earlier, packing.same.ndim) & packing.same
    scores = masked(earlier, matmul.nt(queries, keys))
    y = read + matmul.nn(with_bonus(scores, r, k, u), v)
    return (scaled_state + matmul.tn(v, kept_keys)) * jnp.exp(scaling.log_decay_out), y


def decay_is_mild(log_w: Array, size: int) -> Array:
    """Whether decays are mild enough for `mild_attention_chunk` to lose no float32 precision: a scalar.

    Args:
      log_w: [B, T, H, N], T a multiple of size, or [H, N].
      size: steps in a chunk.
    """
    if log_w.ndim == 2:
        strongest = jnp.min(log_w) * max(size // 2, 1)
    else:
        halves = log_w.reshape(log_w.shape[0], -1, max(size // 2, 1), *log_w.shape[2:])
        strongest = jnp.min(jnp.sum(halves.astype(jnp.float32), axis=2))
    return strongest >= -LARGEST_EXPONENT
