"""A sequence in pieces: each piece is an affine map of the state, and maps can be joined before any state is known.

Over a piece WKV-6 does S -> S diag(g) + Q, and WKV-7 does S -> S P + Q with a matrix P. Joining maps is associative, so
the states at the starts of all pieces come from a prefix over maps, and every piece then runs by itself. Pieces are
chunks of one device's sequence (`associative_scan`) or the shards of a mesh axis (sharded.py).

Sources: Blelloch (1990) for prefixes over recurrences; RWKV-7 (arXiv 2503.14456), whose transition is the matrix
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
    """What a piece does to the state that enters it."""

    transition: Array
    """What becomes of the old state: [..., H, 1, N] for a diagonal, [..., H, N, N] for a matrix, [..., C] for WKV-4's
    logarithm of it."""
    contribution: State
    """The state that the piece makes of the empty one."""


class Algebra(NamedTuple):
    """How an operator's transitions act."""

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
    """The state after a piece."""
    return algebra.add(algebra.advance(state, piece.transition), piece.contribution)


def join(algebra: Algebra, first: AffineMap, second: AffineMap) -> AffineMap:
    """The map of two pieces, one after the other."""
    return AffineMap(algebra.compose(first.transition, second.transition), apply(algebra, second, first.contribution))


Run = Callable[..., tuple[Array, State]]
"""(*inputs, state, segments=, ...) -> (y, state), as implementations are."""


def diagonal_map(run: Run, total_log_decay: Array, state: Array, segments: Array | None) -> AffineMap:
    """The map of a piece of WKV-5 or WKV-6.

    Args:
      run: state -> (y, state) over the piece.
      total_log_decay: [B or 1, H, N], the sum of log w over its steps.
      state: any state of the right shape and dtype, [B, H, M, N].
      segments: [B, T] or None; a piece in which a segment starts forgets the old state.
    """
    transition = jnp.exp(total_log_decay)[:, :, None, :]
    if segments is not None:
        transition = jnp.where((segments[:, -1] == 0)[:, None, None, None], transition, 0)
    return AffineMap(transition, run(jnp.zeros_like(state))[1])


def matrix_map(run: Run, v: Array, state: Array) -> AffineMap:
    """The map of a piece of WKV-7: its rows of the state do not mix, so one run on [0; I] gives both parts.

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
    """A sequence whose pieces lie along the batch axis: row b's piece i is row b * n + i."""

    over_time: tuple[Array, ...]
    """[B * n, C, ...]."""
    segments: Array | None
    """[B * n, C], each counted from the segment of the state that enters the piece."""
    count: int
    """n."""


def fold(over_time: tuple[Array, ...], segments: Array | None, size: int, dtype: jnp.dtype) -> Folded:
    """Cuts [B, T, ...] into pieces of `size` steps; steps of zeros fill the last one.

    Everything comes in the dtype of the recurrence, so that gradients of the two runs over it are added before they are
    rounded.
    """
    batch, time = over_time[0].shape[:2]
    padding = -time % size
    count = (time + padding) // size
    folded = tuple(pad_time(x.astype(dtype), padding).reshape(batch * count, size, *x.shape[2:]) for x in over_time)
    within = chunks.number_within_chunks(segments, padding, size)
    return Folded(folded, None if within is None else within.reshape(batch * count, size), count)


def states_at_starts(algebra: Algebra, pieces: AffineMap, state: State, count: int) -> tuple[State, State]:
    """The states that enter each piece, and the one that leaves the last.

    Args:
      pieces: maps of the pieces of `fold`, [B * n, ...].
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
    """Puts the pieces of y, [B * n, C, ...], together again: [B, T, ...]."""
    return y.reshape(y.shape[0] // count, count * y.shape[1], *y.shape[2:])[:, :time]
