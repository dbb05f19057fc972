"""Communication between the shards of a sequence whose time is split over a mesh axis, inside `jax.shard_map`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments
from rwkv_kernels.xla import state_passing

State = Any
"""A tree of arrays."""


def from_previous_shard(x: Array, axis_name: str) -> Array:
    """The previous shard's x (the halo of a token shift or of segment ids); zeros on the first shard.

    Args:
      x: any array; for a token shift a shard's last token, [B, 1, C].
      axis_name: the mesh axis over which time is split.
    """
    count = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(shard, shard + 1) for shard in range(count - 1)])


def lengths_of_this_shard(lengths: Array | None, time: int, axis_name: str) -> Array | None:
    """Number of this shard's `time` steps that are within each row's length."""
    return None if lengths is None else jnp.clip(lengths - lax.axis_index(axis_name) * time, 0, time)


def segments_of_this_shard(
    segment_ids: Array | None, lengths: Array | None, batch: int, time: int, axis_name: str
) -> Array | None:
    """`segment_index` for this shard's steps; segment 0 continues the previous shard's last one.

    Args:
      lengths: of this shard's steps.
    """
    if segment_ids is None:
        return None
    segment_ids = arguments.check_segment_ids(segment_ids, batch, time)
    before = from_previous_shard(segment_ids[:, -1], axis_name)
    previous = jnp.where(lax.axis_index(axis_name) == 0, segment_ids[:, 0], before)
    return arguments.segment_index(segment_ids, lengths, batch, time, previous)


def state_of_shard(
    ops: state_passing.TransitionOps, span: state_passing.AffineMap, state: State, axis_name: str
) -> State:
    """The initial state of this shard.

    All-gathers the maps of all shards, which are small beside the sequence, and applies those before this one.

    Args:
      span: the map of this shard's steps.
      state: the first shard's initial state.
      axis_name: the mesh axis over which time is split.
    """
    maps = jax.tree.map(lambda x: lax.all_gather(x, axis_name), span)
    index = lax.axis_index(axis_name)
    initial = state
    for shard in range(lax.axis_size(axis_name) - 1):
        following = state_passing.apply(ops, jax.tree.map(lambda x: x[shard], maps), initial)  # noqa: B023  used at once
        initial = jax.tree.map(lambda x, y: jnp.where(shard < index, x, y), following, initial)  # noqa: B023
    return initial


def from_last_shard(state: State, axis_name: str) -> State:
    """Broadcasts the last shard's value to all shards."""
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, 0), axis_name), state)
