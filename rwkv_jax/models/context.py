"""What every layer of a call is told: where texts begin and rows end, and over which mesh axes arrays are split.

A model is split over two mesh axes of its own within `jax.shard_map`: `tensor` (Megatron-LM, arXiv 1909.08053), over
which heads, feed-forward width and vocabulary are split, and `sequence`, over which time is. It needs to know no other:
rows are independent, and a weight that is scattered over devices is gathered before a layer uses it.
"""

from __future__ import annotations

import dataclasses

import jax
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes over which a model's arrays are split; None where they are whole."""

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceContext:
    """What is the same for all layers of a call."""

    segment_ids: Array | None = None
    """Integers [B, T]; a new text begins where the id changes along a row, the first one continues the state."""
    lengths: Array | None = None
    """Integers [B]: steps of each row that count; of the whole sequence, where `axes.sequence` splits it."""
    axes: MeshAxes = dataclasses.field(default=UNSHARDED, metadata={"static": True})
