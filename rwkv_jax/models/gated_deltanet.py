"""Gated DeltaNet: the delta rule with a decay of each head's whole state, and an output gate.

Source: Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464), and flash-linear-attention's layer
for what surrounds the rule; keys and values have equal sizes here, so that the state is as large as RWKV-7's. With
`negative_eigenvalues` beta lies in (0, 2) (arXiv 2411.12537). The rule is a case of WKV-7, whose operator runs it.
Shape letters: B batch, T time, C width, H heads, N head size.
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
    unit_length,
)
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import Linear, MixOutput, broadcast_param, checkpoint_wkv_inputs, wkv_operator
from rwkv_jax.models.transformer import INITIAL_SCALE, normal
from rwkv_kernels import wkv7
from rwkv_kernels.ops.wkv7.api import log_decay_floor

SMALLEST_LOG_DECAY = log_decay_floor(64)
"""-2: the paper's decay has no bound, but below 0.135 a token WKV-7 is exact only step by step: no implementation has
chunks of more than 64."""


class GatedDeltaNetState(NamedTuple):
    """State of a block."""

    inputs: Array
    """[B, 3, 3 C], the last inputs of the convolutions of queries, keys and values."""
    memory: Array
    """[B, H, N, N], value axis first."""


def gated_delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_alpha: Array, state: Array, operator: Callable[..., Any] = wkv7
) -> tuple[Array, Array]:
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, read as y_t = S_t q_t.

    Args:
      q, k: [B, T, H, N], the keys of unit length; v: [B, T, H, M]; beta, log_alpha: [B, T, H], the latter from
        SMALLEST_LOG_DECAY to 0.
      state: [B, H, M, N].
      operator: WKV-7, with all that is bound to it.

    Returns:
      y [B, T, H, M] and the next state.
    """
    log_w = jnp.broadcast_to(log_alpha[..., None].astype(state.dtype), k.shape)
    beta = beta[..., None]
    b = (jnp.exp(log_alpha)[..., None] * beta).astype(k.dtype) * k
    return operator(*checkpoint_wkv_inputs(q, log_w, k, beta.astype(v.dtype) * v, -k, b), state)


class GatedDeltaMix(BaselineMixer):
    """Queries, keys and values by matrices and short convolutions, the gated delta rule, a gated norm over each head.

    Initial values: matrices normal with the Transformer's standard deviation, convolutions PyTorch's; those of the
    decay are Mamba-2's, with rates uniform in (0, 16).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads, dtype = config.width, config.num_heads, config.parameter_dtype
        self.query, self.key, self.value, self.gate = (self.square(rngs) for _ in range(4))
        self.convolution = ShortConvolution(3 * width, dtype, rngs=rngs)
        self.beta, self.alpha = (Linear(normal(rngs.params(), (heads, width), INITIAL_SCALE, dtype)) for _ in range(2))
        # (The smallest number keeps a rate of exactly zero, which has no logarithm, from being drawn.)
        rates = jax.random.uniform(rngs.params(), (heads,), jnp.dtype(dtype), 1e-6, 16.0)
        self.log_rate = nnx.Param(jnp.log(rates))
        self.time_step = nnx.Param(initial_time_steps(rngs.params(), (heads,), dtype))
        self.ln_x = HeadRMSNorm(config.head_dim, dtype)
        self.output = self.writing(rngs)

    @override
    def mix(self, x: Array, *, state: GatedDeltaNetState, context: SequenceContext) -> MixOutput:
        config = self.config
        wide = config.parameter_dtype
        qkv = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        qkv, inputs = self.convolution(qkv, state.inputs, context)
        q, k, v = rearrange(qkv, "B T (three H N) -> three B T H N", three=3, N=config.head_dim)
        q, k = unit_length(q) / math.sqrt(config.head_dim), unit_length(k)
        beta = jax.nn.sigmoid(self.beta(x).astype(wide))
        if config.negative_eigenvalues:
            beta = 2 * beta
        # log alpha_t = -e^{log_rate} dt_t, with dt_t = softplus(x_t W + time_step).
        step = self.alpha(x).astype(wide)
        step = jax.nn.softplus(step + broadcast_param(self.time_step[...], step))
        log_alpha = -step * jnp.exp(broadcast_param(self.log_rate[...], step))
        log_alpha = jnp.maximum(log_alpha, SMALLEST_LOG_DECAY)
        operator = wkv_operator(wkv7, context, config.wkv_implementation)
        y, memory = gated_delta_rule(q, k, v, beta, log_alpha, state.memory, operator)
        g = rearrange(self.gate(x), "B T (H N) -> B T H N", N=config.head_dim)
        return MixOutput(self.output(self.ln_x(y, g)), GatedDeltaNetState(inputs, memory))


class GatedDeltaNetBlock(BaselineBlock):
    """A block of Gated DeltaNet."""

    time_mix_type = GatedDeltaMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.{name}.weight": ("heads", "embed") for name in ("query", "key", "value", "gate", "beta", "alpha")},
    **{f"att.{name}": ("heads",) for name in ("log_rate", "time_step")},
    "att.convolution.weight": (None, None),
    "att.ln_x.weight": (None,),
    "att.output.weight": ("embed", "heads"),
    **FEED_FORWARD_AXES,
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class GatedDeltaNet(Baseline):
    """A Gated DeltaNet language model: `model(tokens, state) -> (logits, state)`."""

    block_type = GatedDeltaNetBlock
    block_axes = BLOCK_AXES
    state_type = GatedDeltaNetState
