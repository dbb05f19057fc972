"""Bidirectional WKV-4 as two recurrences, one from each end, of WKV-4's numerator, denominator and exponent.

Both are read at each step together with the step itself. The sums keep WKV-4's exponent rule (ops/wkv4/scan.py): the
largest exponent is a constant in differentiation, so that nothing overflows and gradients are exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments
from rwkv_kernels.ops.wkv4.scan import State, empty_state, select, update

IMPLEMENTATIONS = ("scan", "chunked")

CHUNK = 32
"""Steps of a chunk, if nothing else is said."""


def biwkv4(
    w: Array,
    u: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Array:
    """A mean of all values of a row, weighted by e^key and the distance per channel.

    Vision-RWKV (arXiv 2403.02308, equation 3): y_t = sum_i W[t, i] e^{k_i} v_i / sum_i W[t, i] e^{k_i}, with
    W[t, i] = e^{-(|t - i| - 1) w} for i other than t, and W[t, t] = e^u. This is the paper's, and not the published
    CUDA kernel's, which weighs distances otherwise.

    Args:
      w, u: [C], any sign; a model's `spatial_decay` and `spatial_first`, divided by T.
      k, v: [B, T, C], any floating dtype, T from 1.
      segment_ids: integers [B, T]; steps of different segments, which end where the id changes, do not see each other.
      lengths: integers [B] from 0 to T; steps beyond a row's length are not read, and their y is zero.
      implementation: `scan`, or `chunked`, whose backward pass stores a state for each chunk and recomputes the rest;
        None is `chunked`.
      chunk_size: steps of a chunk, from 1.

    Returns:
      y [B, T, C] in v's dtype, computed in float32 (float64 where an input is), differentiable in every input.

    Raises:
      ValueError: shapes or dtypes that do not go together, lengths outside 0 to T (if values are known), an unknown
        implementation, or a chunk size below 1 or of one without chunks.
    """
    name = implementation or "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_size is not None and (name != "chunked" or chunk_size < 1):
        raise ValueError(f"chunk_size = {chunk_size}: must be at least 1, and only chunked has chunks; leave it out")
    inputs = {"w": w, "u": u, "k": k, "v": v}
    axes = {"w": "C", "u": "C", "k": "B T C", "v": "B T C"}
    sizes = arguments.axis_sizes(inputs, axes, ("k",))
    arguments.check_inputs(inputs, axes, sizes, "k")
    batch, time = k.shape[:2]
    lengths = arguments.check_lengths(lengths, batch, time)
    segments = arguments.segment_index(segment_ids, lengths, batch, time)
    dtype, given = arguments.recurrence_dtype(inputs), v.dtype
    w, u, k, v = (x.astype(dtype) for x in (w, u, k, v))
    active = jnp.ones((batch, time), bool) if lengths is None else arguments.is_active(lengths, time)
    # What is beyond a row's length may be anything, also NaN.
    k, v = (jnp.where(active[..., None], x, 0) for x in (k, v))
    begins = jnp.zeros((batch, time), bool) if segments is None else arguments.segment_starts(segments)
    ends = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)))
    chunk = time if name == "scan" else min(chunk_size or CHUNK, time)

    before = _sums(-w, k, v, begins, active, chunk)
    back_k, back_v, back_begins, back_active = (jnp.flip(x, axis=1) for x in (k, v, ends, active))
    turned = _sums(-w, back_k, back_v, back_begins, back_active, chunk)
    after = jax.tree.map(lambda x: jnp.flip(x, axis=1), turned)
    y = _read(before, after, u, k, v)
    return jnp.where(active[..., None], y, 0).astype(given)


def _read(before: State, after: State, u: Array, k: Array, v: Array) -> Array:
    """The mean over what is before, after and at each step; all [B, T, C]."""
    own = jnp.broadcast_to(u, k.shape) + k
    largest = lax.stop_gradient(jnp.maximum(jnp.maximum(before[2], after[2]), own))
    past, future = jnp.exp(before[2] - largest), jnp.exp(after[2] - largest)
    present = jnp.exp(own - largest)
    numerator = past * before[0] + future * after[0] + present * v
    return numerator / (past * before[1] + future * after[1] + present)


def _sums(log_w: Array, k: Array, v: Array, begins: Array, active: Array, chunk: int) -> State:
    """The state before each step, each part [B, T, C]; steps that are not active leave it."""
    batch, time, channels = k.shape
    padding = -time % chunk
    empty = empty_state(batch, channels, k.dtype)

    def chunks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))).swapaxes(0, 1)
        return padded.reshape(-1, chunk, *padded.shape[1:])

    def step(state: State, token: tuple[Array, Array, Array, Array]) -> tuple[State, State]:
        k, v, begins, active = token
        state = select(begins[:, None], empty, state)
        following = update(state, jnp.broadcast_to(log_w, k.shape), k, v)
        return select(active[:, None], following, state), state

    def of_chunk(state: State, tokens: tuple[Array, Array, Array, Array]) -> tuple[State, State]:
        return lax.scan(step, state, tokens)

    run = jax.checkpoint(of_chunk) if chunk < time else of_chunk
    _, states = lax.scan(run, empty, (chunks(k), chunks(v), chunks(begins), chunks(active)))

    def whole(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:time].swapaxes(0, 1)

    numerator, denominator, exponent = states
    return whole(numerator), whole(denominator), whole(exponent)
