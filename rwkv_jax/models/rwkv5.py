"""RWKV-5 "Eagle" (5.2) and its previews 5.0 and 5.1: time mixing, channel mixing, initial values, groups and state.

Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence (arXiv 2404.05892, whose equation
numbers are in parentheses), and the official trainer for initial values, parameter groups and the previews. Shape
letters: B batch, T time, C width, H heads, N head size, F feed-forward width, L layers, l the layer's index.

The previews have one decay and bonus per head, [H], 5.2 has one per key channel, [H, N]; 5.0 has no gate.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.generations import RWKV5Spec
from rwkv_jax.models.block import Block
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes, LanguageModel
from rwkv_jax.models.layers import (
    Linear,
    Mixer,
    MixOutput,
    TimeMixer,
    broadcast_param,
    channel_param,
    checkpoint_wkv_inputs,
    initial_head_norm,
    orthogonal,
    row_parallel_gated_linear,
    row_parallel_linear,
    token_shift,
    wkv_operator,
)
from rwkv_jax.models.state import TimeMixState
from rwkv_kernels import wkv5

HEAD_NORM_EPSILON = 64e-5
"""Epsilon of the norm over each head, on the recurrence's raw output (the trainer has y / 8 and 1e-5: the same)."""


def variant(config: ModelConfig) -> RWKV5Spec:
    """Facts that differ between the three versions of RWKV-5."""
    assert isinstance(config.spec, RWKV5Spec), config.generation
    return config.spec


class TimeMix(TimeMixer):
    """Time mixing of layer l: token shift, projections, the WKV-5 recurrence, norm over each head, gate.

    Initial values, with c the channel, q = l / (L - 1) and p = c / (C - 1), in the previews h / (H - 1) of head h:

        time_mix_k               (c / C)^(1 - l / L)
        time_mix_v               (c / C)^(1 - l / L) + 0.3 q
        time_mix_r, time_mix_g   (c / C)^(0.5 (1 - l / L))
        time_decay               -6 + 5 p^(0.7 + 1.3 q)
        time_faaaa               q (1 - p) + 0.1 ((c + 1) mod 3 - 1), in the previews q (1 - p)
        time_first               -3, in place of time_faaaa where the bonus is exponential
        receptance, value        orthogonal, gain 1
        key, gate                orthogonal, gain 0.1, in the previews 1
        output                   0
        ln_x                     weight ((1 + l) / L)^0.7, bias 0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads, head_dim, dtype = config.width, config.num_heads, config.head_dim, config.parameter_dtype
        spec = variant(config)
        is_preview, self.has_gate = not spec.has_channel_decay, spec.has_gate
        ratio_0_to_1 = layer / (config.num_layers - 1)
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        channel = jnp.arange(width, dtype=dtype)
        fraction = channel / width

        self.time_mix_k = channel_param(fraction**ratio_1_to_0)
        self.time_mix_v = channel_param(fraction**ratio_1_to_0 + 0.3 * ratio_0_to_1)
        self.time_mix_r = channel_param(fraction ** (0.5 * ratio_1_to_0))

        # One decay and bonus for each head in the previews, for each channel of a head in 5.2.
        own = jnp.arange(heads, dtype=dtype) if is_preview else channel
        line = own / max(own.size - 1, 1)

        def by_head(x: Array) -> nnx.Param:
            return nnx.Param(x if is_preview else rearrange(x, "(H N) -> H N", N=head_dim))

        self.time_decay = by_head(-6 + 5 * line ** (0.7 + 1.3 * ratio_0_to_1))
        if config.exponential_bonus:
            self.time_first = by_head(jnp.full(own.shape, -3.0, dtype))
        else:
            zigzag = 0.0 if is_preview else 0.1 * ((channel + 1) % 3 - 1)
            self.time_faaaa = by_head(ratio_0_to_1 * (1 - line) + zigzag)

        def square(gain: float) -> Linear:
            return Linear(orthogonal(rngs.params(), (width, width), gain, dtype))

        # The previews' trainer has no smaller gain for key and gate.
        small = 1.0 if is_preview else 0.1
        self.receptance, self.key, self.value = square(1.0), square(small), square(1.0)
        if self.has_gate:
            self.time_mix_g = channel_param(fraction ** (0.5 * ratio_1_to_0))
            self.gate = square(small)
        self.output = Linear(jnp.zeros((width, width), dtype))
        self.ln_x = initial_head_norm(config, layer, HEAD_NORM_EPSILON)

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        config = self.config
        # (3), (4) r, k, v, g: each reads lerp(x_{t-1}, x_t, mu), where mu is the share of the current token.
        x_prev, shift = token_shift(x, state.shift, context)

        def mix(mu: nnx.Param) -> Array:
            share = broadcast_param(mu[...], x)
            return x * share + x_prev * (1 - share)

        def split_heads(x: Array) -> Array:
            return rearrange(x, "B T (H N) -> B T H N", N=config.head_dim)

        r = split_heads(self.receptance(mix(self.time_mix_r)))
        k = split_heads(self.key(mix(self.time_mix_k)))
        v = split_heads(self.value(mix(self.time_mix_v)))

        # (8) wkv_t = diag(u) k_t^T v_t + S_{t-1}, (9) S_t = diag(w) S_{t-1} + k_t^T v_t, read as y_t = r_t wkv_t, with
        # (5) the decay w = exp(-e^{time_decay}); in float32 whatever the compute dtype. One number per head is [H, 1].
        bonus = self.time_first if config.exponential_bonus else self.time_faaaa
        decay, u = (
            rearrange(z[...].astype(config.parameter_dtype), "H ... -> H (...)") for z in (self.time_decay, bonus)
        )
        r, k, v = checkpoint_wkv_inputs(r, k, v)
        log_w, u = -jnp.exp(decay), jnp.exp(u) if config.exponential_bonus else u
        wkv = wkv_operator(wkv5, context, config.wkv_implementation)
        y, wkv_state = wkv(r, log_w, k, v, u, state.wkv)

        # (7) Norm over each head, gate, projection.
        y = self.ln_x(y)
        if self.has_gate:
            y = y * jax.nn.silu(self.gate(mix(self.time_mix_g)))
        o = row_parallel_linear(y, self.output.weight[...], context.axes.tensor)
        return MixOutput(o, TimeMixState(shift, wkv_state, generation=config.generation))


class ChannelMix(Mixer):
    """Channel mixing of layer l: a feed-forward network with squared ReLU on the shifted input, gated by receptance.

    Initial values, with c the channel:

        time_mix_k, time_mix_r   (c / C)^(1 - l / L)
        key                      orthogonal, gain 1, in the previews sqrt(max(F / C, 1))
        receptance, value        0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        mix = (jnp.arange(width, dtype=dtype) / width) ** (1.0 - layer / config.num_layers)
        self.time_mix_k, self.time_mix_r = channel_param(mix), channel_param(mix)
        gain = 1.0 if variant(config).has_channel_decay else math.sqrt(max(ffn_width / width, 1.0))
        self.key = Linear(orthogonal(rngs.params(), (ffn_width, width), gain, dtype))
        self.receptance = Linear(jnp.zeros((width, width), dtype))
        self.value = Linear(jnp.zeros((width, ffn_width), dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)

        def mix(mu: nnx.Param) -> Array:
            share = broadcast_param(mu[...], x)
            return x * share + x_prev * (1 - share)

        # (10), (11) r_t, k_t; (12), (13) o_t = sigmoid(r_t) * W_v max(k_t, 0)^2.
        r = self.receptance(mix(self.time_mix_r))
        k = self.key(mix(self.time_mix_k))
        k = jnp.square(jax.nn.relu(k))
        return MixOutput(
            row_parallel_gated_linear(jax.nn.sigmoid(r), k, self.value.weight[...], context.axes.tensor), shift
        )


class RWKV5Block(Block):
    """A block of RWKV-5."""

    time_mix_type = TimeMix
    channel_mix_type = ChannelMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.time_mix_{name}": (None, None, None) for name in "kvrg"},
    **{f"att.{name}": ("heads", None) for name in ("time_decay", "time_faaaa", "time_first")},
    **{f"att.{name}.weight": ("heads", "embed") for name in ("receptance", "key", "value", "gate")},
    "att.output.weight": ("embed", "heads"),
    "att.ln_x.weight": ("heads",),
    "att.ln_x.bias": ("heads",),
    **{f"ffn.time_mix_{name}": (None, None, None) for name in "kr"},
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
    "ffn.receptance.weight": ("gate", "embed"),
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`): `heads` is the width, split by heads."""


class RWKV5(LanguageModel):
    """An RWKV-5 language model, 5.2 or a preview: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV5Block
    block_axes = BLOCK_AXES
    learning_rate_factors: ClassVar[dict[str, float]] = {"time_decay": 2.0, "time_first": 3.0}
