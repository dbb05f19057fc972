"""The encoder of ViT (arXiv 2010.11929), to compare with: the project's Transformer, whose attention sees all patches.

Positions are those that are added to the patches; attention rotates nothing.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jax import Array
from typing_extensions import override

from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.layers import MixOutput, row_parallel_linear
from rwkv_jax.models.transformer import Attention, Transformer, TransformerBlock, attend


class FullAttention(Attention):
    """Self-attention of every patch to every patch, without a state."""

    @override
    def mix(self, x: Array, *, state: Any, context: SequenceContext) -> MixOutput:
        projected = (project(x) for project in (self.query, self.key, self.value))
        q, k, v = (rearrange(z, "B T (H N) -> B H T N", N=self.config.head_dim) for z in projected)
        y = rearrange(attend(q, k, v, jnp.ones((1, 1, 1, 1), bool)).y, "B H T N -> B T (H N)").astype(x.dtype)
        return MixOutput(row_parallel_linear(y, self.output.weight[...], context.axes.tensor), state)


class ViTBlock(TransformerBlock):
    """A block with `FullAttention`."""

    time_mix_type = FullAttention


class ViT(Transformer):
    """An encoder with `FullAttention`; called like the Transformer."""

    block_type = ViTBlock
