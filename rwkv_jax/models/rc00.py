"""RWKV-8 rc00: RWKV-7 whose channel mixing is scaled by a vector of the token, in every layer.

Source: the official inference code of the experimental release of 2025-05-08, rwkv_v8_rc00_demo.py; no paper and no
trainer have been published, so initial values are ours. With x_t the normalized input:

    k_t = max(W_k lerp(x_t, x_{t-1}, mu), 0)^2     as in RWKV-7
    o_t = (W_v k_t) * table[token_t]

Shape letters: B batch, T time, C width, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import rwkv7
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import Embedding, MixOutput


class ChannelMix(rwkv7.ChannelMix):
    """Channel mixing of layer l, whose output is scaled by token.

    Initial values beside those of RWKV-7's, with which it begins as RWKV-7's:

        enn                      1
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.enn = Embedding(jnp.ones((config.vocab_size, config.width), config.parameter_dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        y, shift = super().mix(x, state=state, context=context)
        return MixOutput(y * self.enn(context.require_tokens(), str(y.dtype), context.axes), shift)


class RC00Block(rwkv7.RWKV7Block):
    """A block of rc00."""

    channel_mix_type = ChannelMix


BLOCK_AXES: dict[str, Axes] = {**rwkv7.BLOCK_AXES, "ffn.enn.weight": ("vocab", None)}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class RC00(rwkv7.RWKV7):
    """A language model of RWKV-8 rc00: `model(tokens, state) -> (logits, state)`."""

    block_type = RC00Block
    block_axes = BLOCK_AXES
    reads_tokens = True
