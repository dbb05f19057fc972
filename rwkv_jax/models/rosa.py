"""RWKV-8's ROSA as the mixer of a language model: each channel, or four at a time, looks up what followed before.

    h_q, h_k, h_v = lerp(h_t, h_{t-1}, mu_j)        q, k, v = W_j h_j + b_j
    y = rosa(q > 0, k > 0, v > 0)                   o = W_o y + b_o

Bits of q at tokens up to t, the longest suffix of them that is in k before t, and the bits of v that came next: each of
them chooses +e or -e of its channel, and 0 where nothing matches, -e with symbols of one bit. Source: RWKV-LM,
RWKV-v8/260212_rosa1bitLM_L12.py and 260222_rosa4bitLM_L12.py; the gradient is that of `rwkv_kernels/rosa/flips.py`.
Shape letters: B batch, T time, C width, G = C / bits groups, S tokens that lookups go back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from typing_extensions import override

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.block import Block, BlockOutput, TimeMixOutput
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import Axes, LanguageModel
from rwkv_jax.models.layers import (
    BiasedLinear,
    LayerNorm,
    MixOutput,
    TimeMixer,
    broadcast_param,
    channel_param,
    checkpoint_wkv_inputs,
    copy_to_tensor_parallel,
    row_parallel_linear,
    token_shift,
    uniform,
)
from rwkv_jax.models.rwkv7 import BLOCK_AXES as RWKV7_AXES
from rwkv_jax.models.rwkv7 import ChannelMix
from rwkv_jax.models.state import State, TimeMixState
from rwkv_kernels.rosa import Outputs, RosaState, empty_state, rosa_qkv


def empty_lookups(config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> RosaState:
    """What lookups of a layer keep of new texts."""
    sizes = config.sizes()
    return empty_state(batch_size, config.width // sizes.rosa_bits // axes.num_tensor_shards, sizes.rosa_window)


class Answers(nnx.Module):
    """The numbers that bits of answers choose: emb [1, 1, C]."""

    def __init__(self, config: ModelConfig) -> None:
        self.emb = channel_param(jnp.ones((config.width,), config.parameter_dtype))


class TimeMix(TimeMixer):
    """ROSA of queries, keys and values.

    Initial values:

        x_q, x_k, x_v            0
        q, k, v                  weights and biases uniform within +- 1 / sqrt(C)
        rosa_qkv.emb             1
        o                        0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        del layer
        self.config = config
        width, dtype = config.width, config.parameter_dtype

        def projection() -> BiasedLinear:
            bound = 1 / math.sqrt(width)
            linear = BiasedLinear(uniform(rngs.params(), (width, width), bound, dtype))
            linear.bias = nnx.Param(uniform(rngs.params(), (width,), bound, dtype))
            return linear

        self.x_q, self.x_k, self.x_v = (channel_param(jnp.zeros((width,), dtype)) for _ in range(3))
        self.q, self.k, self.v = (projection() for _ in range(3))
        self.rosa_qkv = Answers(config)
        self.o = BiasedLinear(jnp.zeros((width, width), dtype))

    @override
    def initial_state(self, batch_size: int) -> TimeMixState:
        shift = jnp.zeros((batch_size, self.config.width), self.config.dtype)
        return TimeMixState(shift, empty_lookups(self.config, batch_size), generation=self.config.generation)

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        """Mixes tokens.

        Args:
          x: [B, T, C], already normalized.
          state: its lookups None for new texts, with which nothing is compared but the call's own tokens.
          context: `axes.sequence` must be None.

        Raises:
          ConfigError: time that is split over a mesh axis.
        """
        config, sizes, axes = self.config, self.config.sizes(), context.axes
        if axes.sequence is not None:
            title = config.spec.title
            raise ConfigError(f"axes.sequence = {axes.sequence!r}: {title}'s lookups are not split over time")
        x_prev, shift = token_shift(x, state.shift, context)
        xx = x_prev - x
        q, k, v = (
            linear(x + xx * broadcast_param(blend[...], x))
            for linear, blend in ((self.q, self.x_q), (self.k, self.x_k), (self.v, self.x_v))
        )
        q, k, v = checkpoint_wkv_inputs(q, k, v)
        e = broadcast_param(self.rosa_qkv.emb[...], q)
        y, lookups = rosa_qkv(
            q,
            k,
            v,
            # Symbols of one bit are published without a third answer.
            Outputs(e, -e, -e if sizes.rosa_bits == 1 else jnp.zeros_like(e)),
            state.wkv,
            bits=sizes.rosa_bits,
            window=sizes.rosa_window,
            segment_ids=context.segment_ids,
            lengths=context.lengths,
            implementation=config.rosa_implementation,
        )
        # Stored for the backward pass under RWKV's name for the output of token mixing.
        y = checkpoint_name(y, "wkv")
        o = row_parallel_linear(y, self.o.weight[...], axes.tensor)
        o = o + broadcast_param(self.o.bias[...], o)
        return MixOutput(o, TimeMixState(shift, lookups, generation=config.generation))


class RosaBlock(Block):
    """A residual block: ROSA, then channel mixing, each after a layer norm."""

    time_mix_type = TimeMix
    channel_mix_type = ChannelMix

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.is_first = isinstance(layer, int) and layer == 0
        if self.is_first or config.unused_norms:
            self.ln0 = LayerNorm(config.width, config.parameter_dtype)
        self.ln2 = LayerNorm(config.width, config.parameter_dtype)
        self.ln3 = LayerNorm(config.width, config.parameter_dtype)
        self.rosa = TimeMix(config, layer, rngs=rngs)
        self.ffn = ChannelMix(config, layer, rngs=rngs)

    @override
    def mix_branch(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> TimeMixOutput:
        if self.is_first:
            x = self.ln0(x)
        y = copy_to_tensor_parallel(self.ln3(x), context.axes.tensor)
        y, after = self.rosa.mix(y, state=state.time_mix, context=context)
        return TimeMixOutput(y, v_first, after)

    @override
    def __call__(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> BlockOutput:
        if self.is_first:
            x = self.ln0(x)
        with jax.named_scope("time_mix"):
            y = copy_to_tensor_parallel(self.ln3(x), context.axes.tensor)
            y, rosa = self.rosa.mix(y, state=state.time_mix, context=context)
            x = x + y
        with jax.named_scope("channel_mix"):
            y = copy_to_tensor_parallel(self.ln2(x), context.axes.tensor)
            y, ffn_shift = self.ffn.mix(y, state=state.ffn_shift, context=context)
            x = x + y
        return BlockOutput(x, v_first, State(rosa.shift, ffn_shift, rosa.wkv, generation=state.generation))


ROSA_AXES: dict[str, Axes] = {
    **{f"rosa.x_{name}": (None, None, None) for name in "qkv"},
    **{f"rosa.{name}.weight": ("heads", "embed") for name in "qkv"},
    **{f"rosa.{name}.bias": ("heads",) for name in "qkv"},
    "rosa.o.weight": ("embed", "heads"),
    "rosa.o.bias": (None,),
    "rosa.rosa_qkv.emb": (None, None, "heads"),
    **{f"ln3.{name}": (None,) for name in ("weight", "bias")},
}
"""Logical axes of ROSA's parameters in a block: `heads` is the width, split by symbols."""


class Rosa(LanguageModel):
    """A language model of ROSA and channel mixing: `model(tokens, state) -> (logits, state)`."""

    block_type = RosaBlock
    block_axes = ROSA_AXES | {name: axes for name, axes in RWKV7_AXES.items() if name.startswith("ffn.")}

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> State:
        shift = jnp.zeros((batch_size, config.width), config.dtype)
        return State(shift, shift, empty_lookups(config, batch_size, axes), generation=config.generation)

    @override
    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """Without lookups, since there is nothing to look back on."""
        state = self.initial_state(batch_size, axes)
        if self.is_stacked:
            return dataclasses.replace(state, wkv=None)
        return tuple(dataclasses.replace(of_layer, wkv=None) for of_layer in state)
