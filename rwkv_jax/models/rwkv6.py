"""RWKV-6 "Finch": time mixing, channel mixing, initial values, parameter groups and state.

Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence (arXiv 2404.05892, whose equation
numbers are in parentheses), and the official trainer for initial values and parameter groups. Shape letters: B batch,
T time, C width, H heads, N head size, F feed-forward width, D low rank, L layers, l the layer's index.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
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
    linear,
    low_rank,
    orthogonal,
    row_parallel_gated_linear,
    row_parallel_linear,
    token_shift,
    uniform,
    wkv_operator,
)
from rwkv_jax.models.state import TimeMixState
from rwkv_kernels import wkv6

HEAD_NORM_EPSILON = 64e-5
"""Epsilon of the norm over each head, on the recurrence's raw output."""


class TimeMix(TimeMixer):
    """Time mixing of layer l: data-dependent token shift, projections, the WKV-6 recurrence, norm, gate.

    Initial values, with c the channel and q = l / (L - 1):

        time_maa_x, _w, _k       1 - (c / C)^(1 - l / L)
        time_maa_v               1 - (c / C)^(1 - l / L) - 0.3 q
        time_maa_r, _g           1 - (c / C)^(0.5 (1 - l / L))
        time_decay               -6 + 5 (c / (C - 1))^(0.7 + 1.3 q)
        time_faaaa               q (1 - c / (C - 1)) + 0.1 ((c + 1) mod 3 - 1)
        time_maa_w1, _decay_w1   0
        time_maa_w2, _decay_w2   uniform in [-0.01, 0.01)
        receptance, value        orthogonal, gain 1
        key, gate                orthogonal, gain 0.1
        output                   0
        ln_x                     weight ((1 + l) / L)^0.7, bias 0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, head_dim, dtype = config.width, config.head_dim, config.parameter_dtype
        mix_rank, decay_rank = config.sizes().mix_rank, config.sizes().decay_rank
        ratio_0_to_1 = layer / (config.num_layers - 1)
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        channel = jnp.arange(width, dtype=dtype)
        fraction = channel / width
        line = channel / (width - 1)

        self.time_maa_x = channel_param(1 - fraction**ratio_1_to_0)
        self.time_maa_w = channel_param(1 - fraction**ratio_1_to_0)
        self.time_maa_k = channel_param(1 - fraction**ratio_1_to_0)
        self.time_maa_v = channel_param(1 - (fraction**ratio_1_to_0 + 0.3 * ratio_0_to_1))
        self.time_maa_r = channel_param(1 - fraction ** (0.5 * ratio_1_to_0))
        self.time_maa_g = channel_param(1 - fraction ** (0.5 * ratio_1_to_0))
        self.time_maa_w1 = nnx.Param(jnp.zeros((width, 5 * mix_rank), dtype))
        self.time_maa_w2 = nnx.Param(uniform(rngs.params(), (5, mix_rank, width), 0.01, dtype))

        self.time_decay = channel_param(-6 + 5 * line ** (0.7 + 1.3 * ratio_0_to_1))
        self.time_decay_w1 = nnx.Param(jnp.zeros((width, decay_rank), dtype))
        self.time_decay_w2 = nnx.Param(uniform(rngs.params(), (decay_rank, width), 0.01, dtype))
        bonus = ratio_0_to_1 * (1 - line) + 0.1 * ((channel + 1) % 3 - 1)
        self.time_faaaa = nnx.Param(rearrange(bonus, "(H N) -> H N", N=head_dim))

        def square(gain: float) -> Linear:
            return Linear(orthogonal(rngs.params(), (width, width), gain, dtype))

        self.receptance, self.key, self.value, self.gate = square(1.0), square(0.1), square(1.0), square(0.1)
        self.output = Linear(jnp.zeros((width, width), dtype))
        self.ln_x = initial_head_norm(config, layer, HEAD_NORM_EPSILON)

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        config = self.config
        # Data-dependent token shift, mu being the previous token's share: (14) lora_j(z) = mu_j + tanh(z A_j) B_j and
        # (15) ddlerp_j(x_t, x_{t-1}) = x_t + (x_{t-1} - x_t) lora_j(x_t + (x_{t-1} - x_t) mu_x), j = w, k, v, r, g.
        x_prev, shift = token_shift(x, state.shift, context)
        xx = x_prev - x
        z = x + xx * broadcast_param(self.time_maa_x[...], x)
        inner = jnp.split(jnp.tanh(linear(z, self.time_maa_w1[...], in_axis=0)), 5, axis=-1)
        shares = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (
            x + xx * (broadcast_param(share[...], x) + linear(hidden, up, in_axis=0))
            for share, hidden, up in zip(shares, inner, self.time_maa_w2[...], strict=True)
        )

        def split_heads(x: Array) -> Array:
            return rearrange(x, "B T (H N) -> B T H N", N=config.head_dim)

        # (16) r, k, v, g; (17) d_t = lora_d(xw), (18) the decay w_t = exp(-e^{d_t}), whose last steps run in float32.
        r = split_heads(self.receptance(xr))
        k = split_heads(self.key(xk))
        v = split_heads(self.value(xv))
        g = jax.nn.silu(self.gate(xg))
        decay = low_rank(xw, self.time_decay_w1[...], self.time_decay_w2[...], jnp.tanh).astype(config.parameter_dtype)
        log_w = -split_heads(jnp.exp(broadcast_param(self.time_decay[...], decay) + decay))

        # (21) wkv_t = diag(u) k_t^T v_t + S_{t-1}, (22) S_t = diag(w_t) S_{t-1} + k_t^T v_t, read as y_t = r_t wkv_t.
        u = self.time_faaaa[...].astype(config.parameter_dtype)
        wkv = wkv_operator(wkv6, context, config.wkv_implementation)
        y, wkv_state = wkv(*checkpoint_wkv_inputs(r, log_w, k, v), u, state.wkv)

        # (20) Norm over each head, gate, projection.
        o = row_parallel_linear(self.ln_x(y) * g, self.output.weight[...], context.axes.tensor)
        return MixOutput(o, TimeMixState(shift, wkv_state, generation=config.generation))


class ChannelMix(Mixer):
    """Channel mixing of layer l: a feed-forward network with squared ReLU on the shifted input, gated by receptance.

    Initial values, with c the channel:

        time_maa_k, time_maa_r   1 - (c / C)^((1 - l / L)^3)
        key                      orthogonal, gain 1
        receptance, value        0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        mix = 1 - (jnp.arange(width, dtype=dtype) / width) ** (ratio_1_to_0**3)
        self.time_maa_k, self.time_maa_r = channel_param(mix), channel_param(mix)
        self.key = Linear(orthogonal(rngs.params(), (ffn_width, width), 1.0, dtype))
        self.receptance = Linear(jnp.zeros((width, width), dtype))
        self.value = Linear(jnp.zeros((width, ffn_width), dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)
        xx = x_prev - x
        # (10), (11) r_t, k_t; (12), (13) o_t = sigmoid(r_t) * W_v max(k_t, 0)^2.
        r = self.receptance(x + xx * broadcast_param(self.time_maa_r[...], x))
        k = self.key(x + xx * broadcast_param(self.time_maa_k[...], x))
        k = jnp.square(jax.nn.relu(k))
        return MixOutput(
            row_parallel_gated_linear(jax.nn.sigmoid(r), k, self.value.weight[...], context.axes.tensor), shift
        )


class RWKV6Block(Block):
    """A block of RWKV-6."""

    time_mix_type = TimeMix
    channel_mix_type = ChannelMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.time_maa_{name}": (None, None, None) for name in "xwkvrg"},
    "att.time_maa_w1": ("embed", None),
    "att.time_maa_w2": (None, None, "embed"),
    "att.time_decay": (None, None, "heads"),
    "att.time_decay_w1": ("embed", None),
    "att.time_decay_w2": (None, "low_rank_heads"),
    "att.time_faaaa": ("heads", None),
    **{f"att.{name}.weight": ("heads", "embed") for name in ("receptance", "key", "value", "gate")},
    "att.output.weight": ("embed", "heads"),
    "att.ln_x.weight": ("heads",),
    "att.ln_x.bias": ("heads",),
    **{f"ffn.time_maa_{name}": (None, None, None) for name in "kr"},
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
    "ffn.receptance.weight": ("gate", "embed"),
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`): `heads` is the width, split by heads."""


class RWKV6(LanguageModel):
    """An RWKV-6 language model: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV6Block
    block_axes = BLOCK_AXES
    learning_rate_factors: ClassVar[dict[str, float]] = {"time_decay": 2.0}
