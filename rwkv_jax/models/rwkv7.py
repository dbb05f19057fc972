"""RWKV-7 "Goose": time mixing, channel mixing, initial values, parameter groups and state.

Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456v2, whose equation numbers are in
parentheses), and the official trainer for initial values and parameter groups. Shape letters: B batch, T time, C width,
H heads, N head size, F feed-forward width, D low rank, L layers, l the layer's index.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.block import Block, TimeMixOutput
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
    low_rank,
    orthogonal,
    row_parallel_linear,
    token_shift,
    wide_dtype,
    wkv_operator,
)
from rwkv_jax.models.state import TimeMixState
from rwkv_kernels import wkv7, wkv7_output, wkv7_step

LOG_DECAY_SCALE = -math.exp(-0.5)
"""log w = -e^{-1/2} sigmoid(.), so that every decay is in (0.545, 1)."""

HEAD_NORM_EPSILON = 64e-5
"""Epsilon of the norm over each head, on the recurrence's raw output."""


class Projections(NamedTuple):
    """What the matrices of a layer's time mixing make of its input, [B, T, C] each, before biases and sigmoids."""

    r: Array
    w: Array
    k: Array
    v: Array
    a: Array
    g: Array
    v_first: Array | None = None
    """The first layer's values; None in a layer without a value residual."""
    nu: Array | None = None
    """Of the value residual."""


class TimeMix(TimeMixer):
    """Time mixing of layer l: token shift, six projections, the WKV-7 recurrence, norm, bonus and gate.

    Initial values, with c the channel, q = l / (L - 1), m = c / (C - 1) - 1/2, and z = s |s|, where s goes from -1 to 1
    along the channels of a head:

        x_r, x_g                 1 - (c / C)^(0.2 (1 - l / L))
        x_k, x_v                 1 - (c / C)^(0.7 (1 - l / L))
        x_w, x_a                 1 - (c / C)^(0.9 (1 - l / L))
        w0                       -5.5 + 6 (c / (C - 1))^(1 + q^0.3) + 2.5 z
        a0                       -0.19 + 0.3 z + 0.4 m
        v0                       0.73 - 0.4 m
        w1, a1, v1, g1           0
        w2, a2, v2, g2           orthogonal, gain 0.1 sqrt(max(D / C, 1))
        k_k, k_a, r_k            0.71 - 0.1 m, 1.02, -0.04
        receptance, value        orthogonal, gain 1
        key                      orthogonal, gain 0.1
        output                   0
        ln_x                     weight ((1 + l) / L)^0.7, bias 0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes = config.sizes()
        # A traced layer index belongs to a stacked layer, never to the first.
        self.is_first = isinstance(layer, int) and layer == 0
        width, heads, head_dim, dtype = config.width, config.num_heads, config.head_dim, config.parameter_dtype
        ratio_0_to_1 = layer / (config.num_layers - 1)
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        channel = jnp.arange(width, dtype=dtype)
        fraction = channel / width
        line = channel / (width - 1) - 0.5
        zigzag = (channel % head_dim - (head_dim - 1) / 2) / ((head_dim - 1) / 2)
        zigzag = zigzag * jnp.abs(zigzag)

        def down(rank: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((width, rank), dtype))

        def up(rank: int) -> nnx.Param:
            gain = 0.1 * (math.sqrt(rank / width) if rank > width else 1.0)
            return nnx.Param(orthogonal(rngs.params(), (rank, width), gain, dtype))

        self.x_r = channel_param(1 - fraction ** (0.2 * ratio_1_to_0))
        self.x_w = channel_param(1 - fraction ** (0.9 * ratio_1_to_0))
        self.x_k = channel_param(1 - fraction ** (0.7 * ratio_1_to_0))
        self.x_v = channel_param(1 - fraction ** (0.7 * ratio_1_to_0))
        self.x_a = channel_param(1 - fraction ** (0.9 * ratio_1_to_0))
        self.x_g = channel_param(1 - fraction ** (0.2 * ratio_1_to_0))

        decay_speed = -6 + 6 * (channel / (width - 1)) ** (1 + ratio_0_to_1**0.3)
        self.w0 = channel_param(decay_speed + 0.5 + 2.5 * zigzag)
        self.w1, self.w2 = down(sizes.decay_rank), up(sizes.decay_rank)
        self.a0 = channel_param(-0.19 + 0.3 * zigzag + 0.4 * line)
        self.a1, self.a2 = down(sizes.iclr_rank), up(sizes.iclr_rank)
        if not self.is_first or config.unused_value_residual:
            self.v0 = channel_param(0.73 - 0.4 * line)
            self.v1, self.v2 = down(sizes.value_rank), up(sizes.value_rank)
        self.g1, self.g2 = down(sizes.gate_rank), up(sizes.gate_rank)

        self.k_k = channel_param(0.71 - 0.1 * line)
        self.k_a = channel_param(jnp.full((width,), 1.02, dtype))
        self.r_k = nnx.Param(jnp.full((heads, head_dim), -0.04, dtype))

        def square(gain: float) -> Linear:
            return Linear(orthogonal(rngs.params(), (width, width), gain, dtype))

        self.receptance, self.key, self.value = square(1.0), square(0.1), square(1.0)
        self.output = Linear(jnp.zeros((width, width), dtype))
        self.ln_x = initial_head_norm(config, layer, HEAD_NORM_EPSILON)

    @override
    def mix(self, x: Array, *, state: TimeMixState, context: SequenceContext) -> MixOutput:
        y, _, state = self.mix_with_residual(x, state=state, v_first=None, context=context)
        return MixOutput(y, state)

    def mix_with_residual(
        self, x: Array, *, state: TimeMixState, v_first: Array | None, context: SequenceContext
    ) -> TimeMixOutput:
        """`mix` with the value residual; v_first [B, T, C] is the first layer's values.

        Returns:
          y [B, T, C], v_first and the next state. If v_first is None, as in the first layer, this layer's values are
          returned.
        """
        config = self.config

        def cast(parameter: nnx.Param, like: Array) -> Array:
            return broadcast_param(parameter[...], like)

        # (3) Token shift: x^j_t = lerp(x_t, x_{t-1}, mu_j) for j = r, w, k, v, a, g.
        x_prev, shift = token_shift(x, state.shift, context)
        xx = x_prev - x
        xr, xw, xk, xv, xa, xg = (
            x + xx * cast(blend, x) for blend in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )

        # Projections: (13) receptance, (5) key, (9) value; low-rank maps of (11) the decay, (4) the in-context learning
        # rate, (8) the value residual; (14) the gate g.
        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        w = low_rank(xw, self.w1[...], self.w2[...], jnp.tanh)
        a = low_rank(xa, self.a1[...], self.a2[...])
        g = low_rank(xg, self.g1[...], self.g2[...], jax.nn.sigmoid)
        projected = Projections(r, w, k, v, a, g)
        if v_first is None:
            v_first = v
        elif not self.is_first:
            projected = projected._replace(v_first=v_first, nu=low_rank(xv, self.v1[...], self.v2[...]))

        if config.step_implementation is not None and x.shape[1] == 1 and context.axes.sequence is None:
            o, wkv_state = self._one_token(projected, state.wkv, context)
        else:
            o, wkv_state = self._tokens(projected, state.wkv, context)

        # (22) Projection.
        o = row_parallel_linear(o, self.output.weight[...], context.axes.tensor)
        return TimeMixOutput(o, v_first, TimeMixState(shift, wkv_state, generation=config.generation))

    def _tokens(self, projected: Projections, wkv_state: Array, context: SequenceContext) -> tuple[Array, Array]:
        """(4) to (21): what the output matrix multiplies [B, T, C], and the recurrence's next state."""
        config = self.config
        r, w, k, v, a, g, v_first, nu = projected

        def cast(parameter: nnx.Param, like: Array) -> Array:
            return broadcast_param(parameter[...], like)

        # (12) The decay w = exp(-e^{-1/2} sigmoid(d)), whose last steps run in float32 (near 1 it has no digits to
        # spare); (10) the value residual, nu being the share of the first layer's values; (4) the in-context learning
        # rate a; one of up to 2 lets a transition's eigenvalue w - a be negative (arXiv 2411.12537), down to -1.455.
        decay = w.astype(config.parameter_dtype)
        decay = cast(self.w0, decay) + decay
        log_w = LOG_DECAY_SCALE * jax.nn.sigmoid(decay)
        if nu is not None and v_first is not None:
            v = v + (v_first - v) * jax.nn.sigmoid(cast(self.v0, v) + nu)
        a = jax.nn.sigmoid(cast(self.a0, k) + a)
        if config.negative_eigenvalues:
            a = 2 * a

        # (6), (15) The removal key kappa, of unit length in a head; (7) the replacement key k~ = k lerp(1, a, alpha).
        kk = _normalize_heads(self._split_heads(k * cast(self.k_k, k)))
        k = k * (1 + (a - 1) * cast(self.k_a, k))

        # (17) State evolution: S_t = S_{t-1} (diag(w_t) - kappa_t^T (a_t kappa_t)) + v_t^T k~_t, read as y_t = S_t r_t.
        r, log_w, k, v, a = map(self._split_heads, (r, log_w, k, v, a))
        inputs = checkpoint_wkv_inputs(r, log_w, k, v, -kk, kk * a)
        y, wkv_state = wkv_operator(wkv7, context, config.wkv_implementation)(*inputs, wkv_state)
        return self._output(y, r, k, v, g), wkv_state

    def _split_heads(self, x: Array) -> Array:
        return rearrange(x, "B T (H N) -> B T H N", N=self.config.head_dim)

    def _output(self, y: Array, r: Array, k: Array, v: Array, g: Array) -> Array:
        """(21) Norm over each head, plus (20) the bonus (r . rho k~) v of the present token; (22) gate: [B, T, C]."""
        if (name := self.config.output_implementation) is not None:
            o = wkv7_output(y, r, k, v, self._split_heads(g), **self._output_parameters(), implementation=name)
            return rearrange(o, "B T H N -> B T (H N)")
        y = self.ln_x(y)
        # (Sums over N as contractions: as a product and a sum they take XLA's CPU backend up to 30 times as long.)
        einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        bonus = einsum("BTHN,BTHN->BTH", r * broadcast_param(self.r_k[...], r), k)
        bonus = rearrange(einsum("BTH,BTHN->BTHN", bonus, v), "B T H N -> B T (H N)")
        return (y + bonus) * g

    def _one_token(self, projected: Projections, wkv_state: Array, context: SequenceContext) -> tuple[Array, Array]:
        """`_tokens` for one token, as one function of a head (`rwkv_kernels.wkv7_step`)."""
        arrays = {name: self._split_heads(x)[:, 0] for name, x in projected._asdict().items() if x is not None}
        biases = {"w0": self.w0, "a0": self.a0, "k_k": self.k_k, "k_a": self.k_a}
        if projected.nu is not None:
            biases["v0"] = self.v0
        o, wkv_state = wkv7_step(
            **arrays,
            **{name: self._of_heads(x) for name, x in biases.items()},
            **self._output_parameters(),
            state=wkv_state,
            decay_scale=LOG_DECAY_SCALE,
            rate_scale=2.0 if self.config.negative_eigenvalues else 1.0,
            lengths=context.lengths,
            implementation=self.config.step_implementation,
        )
        return rearrange(o, "B H N -> B 1 (H N)"), wkv_state

    def _output_parameters(self) -> dict[str, Any]:
        """Of (20) and (21), by the names that `wkv7_output` and `wkv7_step` have for them."""
        weight, bias = map(self._of_heads, (self.ln_x.weight, self.ln_x.bias))
        return {"r_k": self.r_k[...], "weight": weight, "bias": bias, "epsilon": HEAD_NORM_EPSILON}

    def _of_heads(self, parameter: nnx.Param) -> Array:
        """A parameter of all channels as [H, N]."""
        return parameter[...].reshape(self.r_k.shape)


def _normalize_heads(kk: Array) -> Array:
    """kk / max(|kk|, 1e-12) over the last axis, in at least float32 and back; its gradient is finite at zero."""
    wide = kk.astype(wide_dtype(kk.dtype))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(kk.dtype)


class ChannelMix(Mixer):
    """Channel mixing of layer l (the MLP): a feed-forward network with squared ReLU on the shifted input.

    Initial values, with c the channel:

        x_k                      1 - (c / C)^((1 - l / L)^4)
        key                      orthogonal, gain 1
        value                    0
    """

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        ratio_1_to_0 = 1.0 - layer / config.num_layers
        fraction = jnp.arange(width, dtype=dtype) / width
        self.x_k = channel_param(1 - fraction ** (ratio_1_to_0**4))
        self.key = Linear(orthogonal(rngs.params(), (ffn_width, width), 1.0, dtype))
        self.value = Linear(jnp.zeros((width, ffn_width), dtype))

    @override
    def mix(self, x: Array, *, state: Array, context: SequenceContext) -> MixOutput:
        x_prev, shift = token_shift(x, state, context)
        # (23) k_t; (24) o_t = W_v max(k_t, 0)^2.
        k = jnp.square(jax.nn.relu(self.key(x + (x_prev - x) * broadcast_param(self.x_k[...], x))))
        return MixOutput(row_parallel_linear(k, self.value.weight[...], context.axes.tensor), shift)


class RWKV7Block(Block):
    """A block of RWKV-7, which also passes on the first layer's values."""

    time_mix_type = TimeMix
    channel_mix_type = ChannelMix

    @override
    def mix_time(
        self, x: Array, *, state: TimeMixState, v_first: Array | None, context: SequenceContext, att: Any = None
    ) -> TimeMixOutput:
        att = self.att if att is None else att
        return att.mix_with_residual(x, state=state, v_first=v_first, context=context)


_VECTOR_OF_HEADS = (None, None, "heads")

BLOCK_AXES: dict[str, Axes] = {
    **{f"att.x_{name}": (None, None, None) for name in "rwkvag"},
    **{f"att.{name}": _VECTOR_OF_HEADS for name in ("w0", "a0", "v0", "k_k", "k_a")},
    **{f"att.{name}1": ("embed", None) for name in "wavg"},
    **{f"att.{name}2": (None, "low_rank_heads") for name in "wavg"},
    "att.r_k": ("heads", None),
    **{f"att.{name}.weight": ("heads", "embed") for name in ("receptance", "key", "value")},
    "att.output.weight": ("embed", "heads"),
    "att.ln_x.weight": ("heads",),
    "att.ln_x.bias": ("heads",),
    "ffn.x_k": (None, None, None),
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`): `heads` is the width, split by heads."""


class RWKV7(LanguageModel):
    """An RWKV-7 language model: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV7Block
    block_axes = BLOCK_AXES
    learning_rate_factors: ClassVar[dict[str, float]] = {"w0": 2.0}  # the decay's bias
