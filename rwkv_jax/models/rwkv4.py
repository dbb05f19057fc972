"""RWKV-4 "Dove": time mixing, channel mixing, initial values, parameter groups and state.

Source: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048v2, whose equation numbers are in
parentheses), the official trainer for initial values, and that of v4neo, which trained the Pile models, for parameter
groups. Shape letters: B batch, T time, C width,
F feed-forward width, L layers, l the layer's index.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.block import Block
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import Axes, LanguageModel
from rwkv_jax.models.layers import (
    Linear,
    Mixer,
    MixOutput,
    TimeMixer,
    broadcast_param,
    channel_param,
    checkpoint_wkv_inputs,
    orthogonal,
    row_parallel_gated_linear,
    row_parallel_linear,
    token_shift,
    uniform,
    wkv_operator,
)
from rwkv_jax.models.state import State, TimeMixState
from rwkv_kernels import wkv4
from rwkv_kernels.ops.wkv4.scan import empty_state


class TimeMix(TimeMixer):
    """Time mixing of layer l: token shift, three projections, the WKV-4 mean, receptance as its gate.

    Initial values, with c the channel and q = l / (L - 1):

        time_decay               -5 + 8 (c / (C - 1))^(0.7 + 1.3 q)
        time_first               ln 0.3 + 0.5 ((c + 1) mod 3 - 1)
        time_mix_k               (c / C)^(1 - l / L)
        time_mix_v               (c / C)^(1 - l / L) + 0.3 q
        time_mix_r               (c / C)^(0.5 (1 - l / L))
        key, receptance, output  0
        value                    orthogonal, gain 1
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dtype = config.width, config.parameter_dtype
        ratio_0_to_1 = layer / (config.num_layers - 1)
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        channel = jnp.arange(width, dtype=dtype)
        fraction = channel / width

        self.time_decay = nnx.Param(-5 + 8 * (channel / (width - 1)) ** (0.7 + 1.3 * ratio_0_to_1))
        self.time_first = nnx.Param(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.time_mix_k = channel_param(fraction**ratio_1_to_0)
        self.time_mix_v = channel_param(fraction**ratio_1_to_0 + 0.3 * ratio_0_to_1)
        self.time_mix_r = channel_param(fraction ** (0.5 * ratio_1_to_0))

        def zeros() -> Linear:
            return Linear(jnp.zeros((width, width), dtype))

        self.key, self.receptance, self.output = zeros(), zeros(), zeros()
        self.value = Linear(orthogonal(rngs.params(), (width, width), 1.0, dtype))

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        config = self.config

        # (11)-(13), r, k, v: each reads lerp(x_{t-1}, x_t, mu), where mu is the share of the current token.
        x_prev, shift = token_shift(x, state.shift, context)

        def mix(mu: nnx.Param) -> Array:
            share = broadcast_param(mu[...], x)
            return x * share + x_prev * (1 - share)

        r = self.receptance(mix(self.time_mix_r))
        k = self.key(mix(self.time_mix_k))
        v = self.value(mix(self.time_mix_v))

        # (16) wkv_t = (sum_{i<t} e^{(t-1-i) log w + k_i} v_i + e^{u + k_t} v_t) / (the same sum without v), with the
        # decay w = exp(-e^{time_decay}) and the bonus u, both in float32 whatever the compute dtype.
        log_w = -jnp.exp(self.time_decay[...].astype(config.parameter_dtype))
        u = self.time_first[...].astype(config.parameter_dtype)
        wkv = wkv_operator(wkv4, context, config.wkv_implementation)
        y, wkv_state = wkv(log_w, u, *checkpoint_wkv_inputs(k, v), state.wkv)

        # (17) o_t = W_o (sigmoid(r_t) * wkv_t).
        o = row_parallel_linear(jax.nn.sigmoid(r) * y, self.output.weight[...], context.axes.tensor)
        return MixOutput(o, TimeMixState(shift, wkv_state, generation=config.generation))


class ChannelMix(Mixer):
    """Channel mixing of layer l: a feed-forward network with squared ReLU on the shifted input, gated by receptance.

    Initial values, with c the channel:

        time_mix_k, time_mix_r   (c / C)^(1 - l / L)
        key                      orthogonal, gain sqrt(max(F / C, 1))
        receptance, value        0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        mix = (jnp.arange(width, dtype=dtype) / width) ** (1.0 - layer / config.num_layers)
        self.time_mix_k, self.time_mix_r = channel_param(mix), channel_param(mix)
        gain = math.sqrt(max(ffn_width / width, 1.0))
        self.key = Linear(orthogonal(rngs.params(), (ffn_width, width), gain, dtype))
        self.receptance = Linear(jnp.zeros((width, width), dtype))
        self.value = Linear(jnp.zeros((width, ffn_width), dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)

        def mix(mu: nnx.Param) -> Array:
            share = broadcast_param(mu[...], x)
            return x * share + x_prev * (1 - share)

        # (14), (15) r_t, k_t; (18) o_t = sigmoid(r_t) * W_v max(k_t, 0)^2.
        r = self.receptance(mix(self.time_mix_r))
        k = self.key(mix(self.time_mix_k))
        k = jnp.square(jax.nn.relu(k))
        return MixOutput(
            row_parallel_gated_linear(jax.nn.sigmoid(r), k, self.value.weight[...], context.axes.tensor), shift
        )


class RWKV4Block(Block):
    """A block of RWKV-4."""

    time_mix_type = TimeMix
    channel_mix_type = ChannelMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.time_mix_{name}": (None, None, None) for name in "kvr"},
    **{f"att.{name}": ("heads",) for name in ("time_decay", "time_first")},
    **{f"att.{name}.weight": ("heads", "embed") for name in ("receptance", "key", "value")},
    "att.output.weight": ("embed", "heads"),
    **{f"ffn.time_mix_{name}": (None, None, None) for name in "kr"},
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
    "ffn.receptance.weight": ("gate", "embed"),
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`): RWKV-4's `heads` are single channels."""


class RWKV4(LanguageModel):
    """An RWKV-4 language model (Pile, World, Raven): `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV4Block
    block_axes = BLOCK_AXES
    learning_rate_factors: ClassVar[dict[str, float]] = {"time_decay": 2.0, "time_first": 3.0}

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> State:
        """The empty state of one block; `wkv` is (numerator, denominator, max_exponent), each [B, C]."""
        shift, dtype = jnp.zeros((batch_size, config.width), config.dtype), jnp.dtype(config.parameter_dtype)
        wkv = empty_state(batch_size, config.width // axes.num_tensor_shards, dtype)
        return State(shift, shift, wkv, generation=config.generation)

    @override
    @classmethod
    def initial_embedding(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial token vectors [V, C]: uniform within `embedding_bound`, or orthogonal, gain 1e-4 sqrt(max(V, C))."""
        shape = (config.vocab_size, config.width)
        if config.embedding_bound is not None:
            return uniform(rngs.params(), shape, config.embedding_bound, config.parameter_dtype)
        return orthogonal(rngs.params(), shape, 1e-4 * math.sqrt(max(shape)), config.parameter_dtype)
