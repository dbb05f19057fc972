"""What a module needs to know, and to tell its neighbors, where it runs as one shard of many within `jax.shard_map`.

A model splits over two mesh axes of its own (Megatron-LM, arXiv 1909.08053, for the first): `tensor`, over which heads,
feed-forward width and vocabulary are split, and `sequence`, over which time is. Rows and weights split over other axes
are none of its business: rows are independent, and a weight is whole by the time a module uses it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The mesh axes over which a model's arrays are split; None where they are whole."""

    tensor: str | None = None
    """Splits heads, feed-forward width and vocabulary: a shard holds its part of the weights, and x [B, T, C] whole."""
    sequence: str | None = None
    """Splits time: each shard holds T / size consecutive tokens of every row, and all weights."""

    @property
    def num_tensor_shards(self) -> int:
        """Parts into which heads are split."""
        return 1 if self.tensor is None else lax.axis_size(self.tensor)


UNSHARDED = MeshAxes()
"""A model on one device, or under XLA's own partitioning."""


def copy_to_tensor_parallel(x: Array, axis_name: str | None) -> Array:
    """What all shards of an axis hold alike, on its way into work that differs between them.

    The value stays as it is; its gradient is the sum of the shards'. Said once where the ways part, that is one sum.
    """
    return x if axis_name is None else lax.pcast(x, axis_name, to="varying")


def reduce_from_tensor_parallel(x: Array, axis_name: str | None) -> Array:
    """The sum of the shards' partial results, alike on all of them."""
    return x if axis_name is None else lax.psum(x, axis_name)


def as_replicated(x: Array, axis_name: str | None) -> Array:
    """What every shard of an axis has computed alike, as a value that JAX knows to be alike."""
    if axis_name is None:
        return x
    return lax.psum(jnp.where(lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x)), axis_name)


def first_index_here(size: int, axis_name: str | None) -> Array | int:
    """Global index of a shard's first entry along an axis of which it holds `size` entries."""
    return 0 if axis_name is None else size * lax.axis_index(axis_name)
