"""Call context shared by all layers: segment ids, row lengths, and the mesh axes over which arrays are split.

Within `jax.shard_map` a model handles two mesh axes itself: `tensor` (Megatron-LM, arXiv 1909.08053) splits heads,
feed-forward width and vocabulary, `sequence` splits time. It needs no other: rows are independent, and a weight
sharded over devices is gathered before a layer uses it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rwkv_kernels.arguments import values_at_hand


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes over which a model's arrays are split; None for no split."""

    tensor: str | None = None
    """Splits heads, feed-forward width and vocabulary: a shard has its part of the weights, and all of x [B, T, C]."""
    sequence: str | None = None
    """Splits time: each shard has T / size consecutive tokens of every row, and all weights."""

    @property
    def num_tensor_shards(self) -> int:
        """Number of parts into which heads are split."""
        return 1 if self.tensor is None else lax.axis_size(self.tensor)


UNSHARDED = MeshAxes()
"""A model on one device, or under XLA's own partitioning."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceContext:
    """Arguments common to all layers of a call."""

    segment_ids: Array | None = None
    """Integers [B, T]; a new text begins where the id changes along a row; the first continues the state."""
    lengths: Array | None = None
    """Integers [B]: valid steps of each row, counted over the whole sequence even if `axes.sequence` splits it."""
    tokens: Array | None = None
    """Integers [B, T]: the token ids, for layers with tables; None if a call has vectors in their place."""
    embedded: Array | None = None
    """[B, T, C]: the tokens' vectors after layer 0's first norm; only RWKV-7a and 7b have them, within a block."""
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    """Rows and columns of an image whose T = rows x columns patches, in raster order, are each row's tokens: the token
    shift then takes neighbors in two dimensions (grid.py). None for text."""
    grid_kernel: Array | None = None
    """[K, K, C], K odd: what the shift weighs each patch's neighborhood with; None is the quad-directional shift."""
    axes: MeshAxes = dataclasses.field(default=UNSHARDED, metadata={"static": True})

    def require_tokens(self) -> Array:
        """The token ids; raises ValueError if there are none, as in a call of a layer alone."""
        if self.tokens is None:
            raise ValueError("context: has no tokens, which a layer with tables by token reads")
        return self.tokens


def check_tokens(tokens: Array, vocab_size: int) -> Array:
    """Token ids as an array.

    Raises:
      ValueError: no integers of shape [B, T], or, if values are concrete (outside jit), ids out of range.
    """
    ids = jnp.asarray(tokens)
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"tokens: {ids.dtype} of shape {ids.shape} must be integers of shape [B, T], T from 1")
    if values_at_hand(tokens):
        values = np.asarray(tokens)
        if values.min() < 0 or values.max() >= vocab_size:
            raise ValueError(
                f"tokens: from {values.min()} to {values.max()} must lie from 0 to V - 1 = {vocab_size - 1}"
            )
    return ids
