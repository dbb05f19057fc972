"""RWKV-7a: RWKV-7 with DeepEmbed, a table of numbers by token in every channel mixing.

Source: the official inference code, RWKV-LM's RWKV-v7/rwkv_v7a_demo.py; no paper and no trainer have been published, so
initial values are ours. With e_t the token's vector after layer 0's first norm and x_t the normalized input:

    M_t = table[token_t] + W e_t                   [D, D], row by row
    k_t = max(W_k lerp(x_t, x_{t-1}, mu), 0)^2     as in RWKV-7
    o_t = W_v (k_t * (s0 + (x_t s1) M_t s2))

The official code adds W e of all tokens to the table when it loads, as `folded_tables.py` does for inference; here both
terms are computed for the tokens of a call, so that all parts train. Shape letters: B batch, T time, C width,
F feed-forward width, D rank, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import rwkv7
from rwkv_jax.models.block import BlockOutput
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import (
    Embedding,
    Linear,
    MixOutput,
    broadcast_param,
    channel_param,
    linear,
    orthogonal,
    row_parallel_linear,
    token_shift,
)


class FromFirst(NamedTuple):
    """What layer 0 hands on to all others."""

    values: Array
    """[B, T, C], its values, for the value residual."""
    embedded: Array
    """[B, T, C], the tokens' vectors after its first norm."""


def rows_of_tokens(table: Embedding, map_: Linear | None, context: SequenceContext) -> Array:
    """table[token] + W e of each token, [B, T, D], in e's dtype; of a folded table (`folded_tables.py`) its rows.

    Raises:
      ValueError: the context lacks them, as in a call of the layer alone.
    """
    tokens, embedded = context.require_tokens(), context.embedded
    if embedded is None:
        raise ValueError("context: has no vectors of its tokens, which a layer with tables by token reads")
    # In the compute dtype, as the official code has the sum of both.
    rows = table(tokens, str(embedded.dtype), context.axes)
    return rows if map_ is None else rows + map_(embedded)


class ChannelMix(rwkv7.ChannelMix):
    """Channel mixing of layer l with DeepEmbed: a feed-forward network whose hidden channels are scaled by token.

    Initial values beside those of RWKV-7's, with which it begins as RWKV-7's:

        s_emb                    the identity, for every token
        s_emb_x, s1              0
        s2                       orthogonal, gain 0.1
        s0                       1
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        sizes, width, dtype = config.sizes(), config.width, config.parameter_dtype
        rank = sizes.deep_embed_rank
        identity = jnp.eye(rank, dtype=dtype).reshape(1, rank * rank)
        self.s_emb = Embedding(jnp.broadcast_to(identity, (config.vocab_size, rank * rank)))
        self.s_emb_x: Linear | None = Linear(jnp.zeros((rank * rank, width), dtype))
        self.s0 = channel_param(jnp.ones((sizes.ffn_width,), dtype))
        self.s1 = nnx.Param(jnp.zeros((width, rank), dtype))
        self.s2 = nnx.Param(orthogonal(rngs.params(), (rank, sizes.ffn_width), 0.1, dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)
        k = jnp.square(jax.nn.relu(self.key(x + (x_prev - x) * broadcast_param(self.x_k[...], x))))
        # Of the tokens alone, not of the shifted input.
        rows = rows_of_tokens(self.s_emb, self.s_emb_x, context)
        own = linear(x, self.s1[...], in_axis=0)
        by_token = rearrange(rows, "B T (D E) -> B T D E", E=own.shape[-1])
        own = jnp.einsum("BTD,BTDE->BTE", own, by_token, precision=jax.lax.Precision.HIGHEST)
        scale = linear(own, self.s2[...], in_axis=0)
        k = k * (broadcast_param(self.s0[...], scale) + scale)
        return MixOutput(row_parallel_linear(k, self.value.weight[...], context.axes.tensor), shift)


class RWKV7aBlock(rwkv7.RWKV7Block):
    """A block of RWKV-7a."""

    channel_mix_type = ChannelMix

    @override
    def __call__(self, x: Array, *, state: Any, v_first: FromFirst | None, context: SequenceContext) -> BlockOutput:
        if v_first is None:
            x = self.ln0(x)
        values, embedded = (None, x) if v_first is None else v_first
        context = dataclasses.replace(context, embedded=embedded)
        x, values, state = self.add_branches(x, state=state, v_first=values, context=context)
        return BlockOutput(x, FromFirst(values, embedded), state)


BLOCK_AXES: dict[str, Axes] = {
    **rwkv7.BLOCK_AXES,
    "ffn.s_emb.weight": ("vocab", None),
    "ffn.s_emb_x.weight": (None, "embed"),
    "ffn.s0": (None, None, "ffn"),
    "ffn.s1": ("embed", None),
    "ffn.s2": (None, "ffn"),
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class RWKV7a(rwkv7.RWKV7):
    """An RWKV-7a language model: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV7aBlock
    block_axes = BLOCK_AXES
    reads_tokens = True
