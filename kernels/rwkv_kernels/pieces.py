"""State passing between pieces of a sequence, each of which is an affine map of the state.

Over a piece WKV-6 maps S to S diag(g) + Q, and WKV-7 maps S to S P + Q with a matrix P. Composition is associative, so
a prefix scan over the maps gives the states at the starts of all pieces, which then run in parallel. Pieces are chunks
of one device's sequence (`associative_scan`) or the shards of a mesh axis (sharded.py).

Sources: Blelloch (1990) for prefix scans over recurrences; RWKV-7 (arXiv 2503.14456), whose transition is the matrix
diag(w) + a b^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import chunks
from rwkv_kernels.arguments import pad_time

State = Any
"""A tree of arrays: [B, H, M, N], or WKV-4's three of [B, C]."""


class AffineMap(NamedTuple):
    """The map that a piece applies to its incoming state."""

    transition: Array
    """The linear part: [..., H, 1, N] for a diagonal, [..., H, N, N] for a matrix, [..., C] for the log of WKV-4's
    decay."""
    contribution: State
    """The constant part: the piece's final state from the empty state."""


class Algebra(NamedTuple):
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


DIAGONAL = Algebra(advance=_multiply, compose=_multiply, add=_add)
"""Of WKV-5 and 6."""

MATRIX = Algebra(advance=_matmul, compose=_matmul, add=_add)
"""Of WKV-7."""


def apply(algebra: Algebra, piece: AffineMap, state: State) -> State:
    """The state after a piece, from the state before it."""
    return algebra.add(algebra.advance(state, piece.transition), piece.contribution)


def join(algebra: Algebra, first: AffineMap, second: AffineMap) -> AffineMap:
    """The composition of two consecutive pieces' maps."""
    return AffineMap(algebra.compose(first.transition, second.transition), apply(algebra, second, first.contribution))


Run = Callable[..., tuple[Array, State]]
"""(*inputs, state, segments=, ...) -> (y, state), as implementations are."""


def diagonal_map(run: Run, total_log_decay: Array, state: Array, segments: Array | None) -> AffineMap:
    """The map of a piece of WKV-5 or WKV-6.

    Args:
      run: state -> (y, state) over the piece.
      total_log_decay: [B or 1, H, N], the sum of log w over its steps.
      state: any state of the right shape and dtype, [B, H, M, N].
      segments: [B, T] or None; in a piece where a segment starts, the linear part is 0.
    """
    transition = jnp.exp(total_log_decay)[:, :, None, :]
    if segments is not None:
        transition = jnp.where((segments[:, -1] == 0)[:, None, None, None], transition, 0)
    return AffineMap(transition, run(jnp.zeros_like(state))[1])


def matrix_map(run: Run, v: Array, state: Array) -> AffineMap:
    """The map of a piece of WKV-7; the state's rows are independent, so one run from [0; I] gives both parts.

    Args:
      run: (v, state) -> (y, state) over the piece.
      v: [B, T, H, M].
      state: any state of the right shape and dtype, [B, H, M, N].
    """
    value_dim, key_dim = state.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=state.dtype), (*state.shape[:-2], key_dim, key_dim))
    no_values = jnp.zeros((*v.shape[:-1], key_dim), v.dtype)
    both = jnp.concatenate([jnp.zeros_like(state), identity], axis=-2)
    _, both = run(jnp.concatenate([v, no_values], axis=-1), both)
    return AffineMap(both[..., value_dim:, :], both[..., :value_dim, :])


class Folded(NamedTuple):
    """A sequence cut into pieces along the batch axis: piece i of row b is row b * n + i."""

    over_time: tuple[Array, ...]
    """[B * n, C, ...]."""
    segments: Array | None
    """[B * n, C], relative to the segment of the piece's incoming state."""
    count: int
    """n, pieces per row."""


def fold(over_time: tuple[Array, ...], segments: Array | None, size: int, dtype: jnp.dtype) -> Folded:
    """Cuts [B, T, ...] into pieces of `size` steps, the last one padded with zeros.

    Casts to the recurrence's dtype, so that gradients of the two runs over it are summed before they are rounded.
    """
    batch, time = over_time[0].shape[:2]
    padding = -time % size
    count = (time + padding) // size
    folded = tuple(pad_time(x.astype(dtype), padding).reshape(batch * count, size, *x.shape[2:]) for x in over_time)
    within = chunks.number_within_chunks(segments, padding, size)
    return Folded(folded, None if within is None else within.reshape(batch * count, size), count)


def states_at_starts(algebra: Algebra, pieces: AffineMap, state: State, count: int) -> tuple[State, State]:
    """The incoming state of every piece, and the final state.

    Args:
      pieces: maps of the pieces from `fold`, [B * n, ...].
      state: the initial state, [B, ...].
      count: n.

    Returns:
      States [B * n, ...], and the final state [B, ...].
    """

    def join_all(first: AffineMap, second: AffineMap) -> AffineMap:
        return join(algebra, first, second)

    batch = jax.tree.leaves(state)[0].shape[0]
    apart = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0), pieces)
    prefixes = lax.associative_scan(join_all, apart, axis=0)
    ends = jax.vmap(lambda piece: apply(algebra, piece, state))(prefixes)
    final = jax.tree.map(lambda x: x[-1], ends)
    entering = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, ends)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch * count, *x.shape[2:]), entering), final


def unfold(y: Array, count: int, time: int) -> Array:
    """Inverse of `fold`: y [B * n, C, ...] -> [B, T, ...]."""
    return y.reshape(y.shape[0] // count, count * y.shape[1], *y.shape[2:])[:, :time]
