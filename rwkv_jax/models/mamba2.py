"""Mamba-2: a state space model with one decay a head, a short convolution, a skip and a gated norm.

Source: Transformers are SSMs (arXiv 2405.21060), section 7, and the official code (state-spaces/mamba) for initial
values. The recurrence of the state space dual is gated linear attention with one decay a head: the paper's x is v, its
B is k, its C is q, and its time step dt scales what is written. Shape letters: B batch, T time, C width, H heads, N
head size, S state size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.baseline import (
    FEED_FORWARD_AXES,
    Baseline,
    BaselineBlock,
    BaselineMixer,
    HeadRMSNorm,
    ShortConvolution,
    initial_time_steps,
)
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.gla import gated_linear_attention
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import Linear, MixOutput, broadcast_param, uniform, wkv_operator
from rwkv_kernels import wkv6


class Mamba2State(NamedTuple):
    """State of a block."""

    inputs: Array
    """[B, 3, 2 C + 2 S], the last inputs of the convolution of values, keys and queries."""
    memory: Array
    """[B, H, N, S], value axis first."""


def state_space_dual(
    q: Array, k: Array, v: Array, log_alpha: Array, state: Array, operator: Callable[..., Any] = wkv6
) -> tuple[Array, Array]:
    """S_t = alpha_t S_{t-1} + v_t k_t^T, read as y_t = S_t q_t.

    Args:
      q, k: [B, T, H, S]; v: [B, T, H, N]; log_alpha: [B, T, H], at most 0.
      state: [B, H, N, S].
      operator: WKV-6, with all that is bound to it. It takes any decay.

    Returns:
      y [B, T, H, N] and the next state.
    """
    return gated_linear_attention(q, k, v, jnp.broadcast_to(log_alpha[..., None], k.shape), state, operator)


class MambaMix(BaselineMixer):
    """Gate, values, keys, queries and time steps by one matrix, a convolution, the recurrence, skip and gated norm.

    Initial values: matrices and convolution PyTorch's, uniform within +- 1 / sqrt(inputs), the output divided by
    sqrt(2 L); rates uniform in [1, 16), time steps log-uniform in [0.001, 0.1), skips 1.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dtype = config.width, config.parameter_dtype
        inner, size, heads = 2 * width, config.sizes().state_size, 2 * config.num_heads
        bound = 1 / math.sqrt(width)
        self.input = Linear(uniform(rngs.params(), (2 * inner + 2 * size + heads, width), bound, dtype))
        self.convolution = ShortConvolution(inner + 2 * size, dtype, rngs=rngs, has_bias=True)
        rates = jax.random.uniform(rngs.params(), (heads,), jnp.dtype(dtype), 1.0, 16.0)
        self.log_rate = nnx.Param(jnp.log(rates))
        self.time_step = nnx.Param(initial_time_steps(rngs.params(), (heads,), dtype))
        self.skip = nnx.Param(jnp.ones((heads,), dtype))
        self.ln_x = HeadRMSNorm(inner, dtype)
        bound = 1 / math.sqrt(inner) / math.sqrt(2 * config.num_layers)
        self.output = Linear(uniform(rngs.params(), (width, inner), bound, dtype))

    @override
    def mix(self, x: Array, *, state: Mamba2State, context: SequenceContext) -> MixOutput:
        config = self.config
        inner, size, heads = 2 * config.width, config.sizes().state_size, 2 * config.num_heads
        z, xkq, step = jnp.split(self.input(x), [inner, 2 * inner + 2 * size], axis=-1)
        xkq, inputs = self.convolution(xkq, state.inputs, context)
        v, k, q = jnp.split(xkq, [inner, inner + size], axis=-1)
        v = rearrange(v, "B T (H N) -> B T H N", H=heads)
        k, q = (jnp.broadcast_to(y[:, :, None, :], (*y.shape[:2], heads, size)) for y in (k, q))
        # dt_t = softplus(x_t W + time_step) scales what is written, and log alpha_t = -e^{log_rate} dt_t.
        step = step.astype(config.parameter_dtype)
        step = jax.nn.softplus(step + broadcast_param(self.time_step[...], step))
        log_alpha = -step * jnp.exp(broadcast_param(self.log_rate[...], step))
        operator = wkv_operator(wkv6, context, config.wkv_implementation)
        written = step[..., None].astype(v.dtype) * v
        y, memory = state_space_dual(q, k, written, log_alpha, state.memory, operator)
        y = y + broadcast_param(self.skip[...], step)[..., None].astype(v.dtype) * v
        # The gate goes before the norm, which is over all channels.
        y = rearrange(y, "B T H N -> B T 1 (H N)") * jax.nn.silu(z)[:, :, None]
        return MixOutput(self.output(self.ln_x(y)), Mamba2State(inputs, memory))


class Mamba2Block(BaselineBlock):
    """A block of Mamba-2."""

    time_mix_type = MambaMix


BLOCK_AXES: dict[str, Axes] = {
    "att.input.weight": (None, "embed"),
    "att.convolution.weight": (None, None),
    **{f"att.{name}": (None,) for name in ("convolution.bias", "log_rate", "time_step", "skip", "ln_x.weight")},
    "att.output.weight": ("embed", "heads"),
    **FEED_FORWARD_AXES,
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class Mamba2(Baseline):
    """A Mamba-2 language model: `model(tokens, state) -> (logits, state)`."""

    block_type = Mamba2Block
    block_axes = BLOCK_AXES
    state_type = Mamba2State
