"""State passing: the initial states of chunks or shards, from the affine map of the state that each of them is.

Over a span of steps WKV-6 maps S to S diag(g) + Q, and WKV-7 maps S to S P + Q with a matrix P. Composition is
associative, so a prefix scan over the maps of all spans gives the initial state of each, and they then run in parallel.
Spans are chunks of one device's sequence (`associative_scan`) or the shards of a mesh axis (sharded.py).

Sources: Blelloch (1990) for prefix scans over recurrences; RWKV-7 (arXiv 2503.14456), whose transition is the matrix
diag(w) + a b^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import pad_time
from rwkv_kernels.chunking import local_segment_index

State = Any
"""A tree of arrays: [B, H, M, N], or WKV-4's three of [B, C]."""


class AffineMap(NamedTuple):
    """The map from the initial to the final state of a span."""

    transition: Array
    """The linear part: [..., H, 1, N] for a diagonal, [..., H, N, N] for a matrix, [..., C] for the log of WKV-4's
    decay."""
    contribution: State
    """The constant part: the final state from the empty state."""


class TransitionOps(NamedTuple):
    """Operations on an operator's transitions."""

    advance: Callable[[State, Array], State]
    """(state, transition) -> state."""
    compose: Callable[[Array, Array], Array]
    """(first transition, second) -> both."""
    add: Callable[[State, State], State]


def _add(x: Array, y: Array) -> Array:
    return x + y


def _multiply(x: Array, y: Array) -> Array:
    return x * y


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


DIAGONAL = TransitionOps(advance=_multiply, compose=_multiply, add=_add)
"""Of WKV-5 and 6."""

MATRIX = TransitionOps(advance=_matmul, compose=_matmul, add=_add)
"""Of WKV-7."""


def apply(ops: TransitionOps, span: AffineMap, state: State) -> State:
    """The state after a span, from the state before it."""
    return ops.add(ops.advance(state, span.transition), span.contribution)


def compose(ops: TransitionOps, first: AffineMap, second: AffineMap) -> AffineMap:
    """The map of two consecutive spans."""
    return AffineMap(ops.compose(first.transition, second.transition), apply(ops, second, first.contribution))


Run = Callable[..., tuple[Array, State]]
"""(*inputs, state, segments=, ...) -> (y, state), as implementations are."""


def diagonal_map(run: Run, total_log_decay: Array, state: Array, segments: Array | None) -> AffineMap:
    """The map of a span of WKV-5 or WKV-6.

    Args:
      run: state -> (y, state) over the span.
      total_log_decay: [B or 1, H, N], the sum of log w over its steps.
      state: any state of the right shape and dtype, [B, H, M, N].
      segments: [B, T] or None; in a span where a segment starts, the linear part is 0.
    """
    transition = jnp.exp(total_log_decay)[:, :, None, :]
    if segments is not None:
        transition = jnp.where((segments[:, -1] == 0)[:, None, None, None], transition, 0)
    return AffineMap(transition, run(jnp.zeros_like(state))[1])


def matrix_map(run: Run, v: Array, state: Array) -> AffineMap:
    """The map of a span of WKV-7; the state's rows are independent, so one run from [0; I] gives both parts.

    Args:
      run: (v, state) -> (y, state) over the span.
      v: [B, T, H, M].
      state: any state of the right shape and dtype, [B, H, M, N].
    """
    value_dim, key_dim = state.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=state.dtype), (*state.shape[:-2], key_dim, key_dim))
    no_values = jnp.zeros((*v.shape[:-1], key_dim), v.dtype)
    both = jnp.concatenate([jnp.zeros_like(state), identity], axis=-2)
    _, both = run(jnp.concatenate([v, no_values], axis=-1), both)
    return AffineMap(both[..., value_dim:, :], both[..., :value_dim, :])


class Chunks(NamedTuple):
    """Sequences split into chunks along the batch axis: chunk i of row b is row b * n + i."""

    over_time: tuple[Array, ...]
    """[B * n, C, ...]."""
    segments: Array | None
    """[B * n, C], relative to the segment of the chunk's initial state."""
    count: int
    """n, chunks per row."""


def split_chunks(over_time: tuple[Array, ...], segments: Array | None, size: int, dtype: jnp.dtype) -> Chunks:
    """Splits [B, T, ...] into chunks of `size` steps, the last one padded with zeros.

    Casts to the recurrence's dtype, so that gradients of the two runs over it are summed before they are rounded.
    """
    batch, time = over_time[0].shape[:2]
    padding = -time % size
    count = (time + padding) // size
    split = tuple(pad_time(x.astype(dtype), padding).reshape(batch * count, size, *x.shape[2:]) for x in over_time)
    local_segments = local_segment_index(segments, padding, size)
    return Chunks(split, None if local_segments is None else local_segments.reshape(batch * count, size), count)


def chunk_initial_states(ops: TransitionOps, maps: AffineMap, state: State, count: int) -> tuple[State, State]:
    """The initial state of every chunk, and the final state.

    Args:
      maps: of the chunks from `split_chunks`, [B * n, ...].
      state: the initial state, [B, ...].
      count: n.

    Returns:
      States [B * n, ...], and the final state [B, ...].
    """

    def compose_all(first: AffineMap, second: AffineMap) -> AffineMap:
        return compose(ops, first, second)

    batch = jax.tree.leaves(state)[0].shape[0]
    apart = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0), maps)
    prefixes = lax.associative_scan(compose_all, apart, axis=0)
    ends = jax.vmap(lambda prefix: apply(ops, prefix, state))(prefixes)
    final = jax.tree.map(lambda x: x[-1], ends)
    initial = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, ends)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch * count, *x.shape[2:]), initial), final


def merge_chunks(y: Array, count: int, time: int) -> Array:
    """Inverse of `split_chunks`: y [B * n, C, ...] -> [B, T, ...]."""
    return y.reshape(y.shape[0] // count, count * y.shape[1], *y.shape[2:])[:, :time]
