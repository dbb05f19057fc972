"""ROSA in JAX: the lengths of all matches, token after token, with the last S keys.

Lane i of S compares each query with the key that is S - i tokens older, so what a lane has matched so far, its length,
grows by one or falls to zero, and the longest match is the largest of S numbers, the latest of equal ones the last.
That is S operations a token, all alike, on any device, where an automaton has a few that depend on each other. It is
the definition that the automaton is held against, and what models compute, whose texts look back on S tokens.

Shape letters: B batch, T time, G sequences of a row (groups of channels), S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import broadcast_varying_axes, segment_index, segment_starts


class RosaState(NamedTuple):
    """What is kept of a text: its last S tokens, the newest last, and what each lane has matched."""

    keys: Array
    """Integers [B, G, S]."""
    values: Array
    """Integers [B, G, S]."""
    lengths: Array
    """int32 [B, G, S]: of lane i, the queries up to now that equal the keys S - i tokens before them."""
    count: Array
    """int32 [B]: tokens of the text so far; of fewer than S, the first lanes have no key."""


class Matches(NamedTuple):
    """What a call's queries matched."""

    place: Array
    """int32 [B, G, T]: of the answer in the S + T values of state and call; undefined where there is none."""
    length: Array
    """int32 [B, G, T]: of the match; 0 where there is none."""


def empty_state(batch: int, groups: int, size: int, dtype: str = "uint8") -> RosaState:
    """The state of new texts with room for S tokens."""
    symbols = jnp.zeros((batch, groups, size), dtype)
    return RosaState(symbols, symbols, jnp.zeros((batch, groups, size), jnp.int32), jnp.zeros((batch,), jnp.int32))


def keys_in_reach(
    count: Array, time: int, segment_ids: Array | None, lengths: Array | None
) -> tuple[Array, Array, Array]:
    """What a call's tokens may look back on.

    Args:
      count: int32 [B], tokens before the call.
      segment_ids: integers [B, T], of which a change begins a new text; lengths: integers [B], tokens of each row.

    Returns:
      int32 [B, T], the tokens of the text before each one; bool [B, T], whether a token is one of the row; int32 [B],
      the tokens of the row's last text after the call.
    """
    step = jnp.arange(time, dtype=jnp.int32)[None]
    ends = jnp.full_like(count, time) if lengths is None else lengths
    is_read = step < ends[:, None]
    segments = segment_index(segment_ids, lengths, len(count), time)
    if segments is None:
        return count[:, None] + step, is_read, count + ends
    begin = lax.cummax(jnp.where(segment_starts(segments), step, 0), axis=1)
    before = jnp.where(segments == 0, count[:, None] + step, step - begin)
    last = jnp.take_along_axis(before, jnp.maximum(ends - 1, 0)[:, None], axis=1)[:, 0]
    return before, is_read, jnp.where(ends > 0, last + 1, count)


def with_keys(held: Array, new: Array) -> Array:
    """The symbols [B, G, S + T] of a state and a call."""
    return jnp.concatenate([held, new.astype(held.dtype)], axis=2)


def at_step(symbols: Array, step: Array | int, size: int) -> Array:
    """The S symbols before a token of the call."""
    return lax.dynamic_slice_in_dim(symbols, step, size, axis=2)


def match(queries: Array, keys: Array, state: RosaState, before: Array, is_read: Array) -> tuple[Matches, Array]:
    """Looks up a call's queries.

    Args:
      queries: [B, G, T]; keys: [B, G, S + T], from `with_keys`.
      before, is_read: from `keys_in_reach`.

    Returns:
      The matches, and the lanes' next lengths [B, G, S].
    """
    size = state.keys.shape[2]
    lane = jnp.arange(size, dtype=jnp.int32)

    def step(lengths: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        time, query, before, is_read = token
        has_key = lane >= size - before[:, None, None]
        equal = has_key & (at_step(keys, time, size) == query[:, :, None])
        after = jnp.where(equal, lengths + 1, 0)
        length = jnp.max(after, axis=2)
        latest = jnp.max(jnp.where(after == length[:, :, None], lane, -1), axis=2)
        return jnp.where(is_read[:, None, None], after, lengths), (time + latest + 1, length)

    time = jnp.arange(queries.shape[2], dtype=jnp.int32)
    tokens = (time, jnp.moveaxis(queries.astype(keys.dtype), 2, 0), before.T, is_read.T)
    initial, _ = broadcast_varying_axes(state.lengths, (queries, keys, before, is_read))
    after, (place, length) = lax.scan(step, initial, tokens)
    return Matches(jnp.moveaxis(place, 0, 2), jnp.moveaxis(length, 0, 2)), after


def next_state(
    state: RosaState, keys: Array, values: Array, lane_lengths: Array, count: Array, lengths: Array | None
) -> RosaState:
    """The state after a call.

    Args:
      keys, values: [B, G, S + T]; lane_lengths: [B, G, S], after the call; count: int32 [B], after the call.
      lengths: integers [B], tokens of each row; None is all.
    """
    size = state.keys.shape[2]

    def last(symbols: Array) -> Array:
        if lengths is None:
            return symbols[:, :, symbols.shape[2] - size :]
        return jax.vmap(lambda row, begin: lax.dynamic_slice_in_dim(row, begin, size, axis=1))(symbols, lengths)

    return RosaState(last(keys), last(values), lane_lengths, count)


def without_others(state: RosaState) -> RosaState:
    """The state with zeros where it has tokens of an earlier text of the row, which nothing reads."""
    size = state.keys.shape[2]
    own = jnp.arange(size) >= size - state.count[:, None, None]
    keys, values, lengths = (jnp.where(own, x, jnp.zeros_like(x)) for x in state[:3])
    return RosaState(keys, values, lengths, state.count)
