"""DeltaNet: linear attention that writes by the delta rule, with short convolutions.

Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484), and
flash-linear-attention's layer for what surrounds the rule. With `negative_eigenvalues` beta lies in (0, 2) (arXiv
2411.12537). The rule is a case of WKV-7, whose operator runs it. Shape letters: B batch, T time, C width, H heads, N
head size.
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
    unit_length,
)
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import Linear, MixOutput, checkpoint_wkv_inputs, wkv_operator
from rwkv_jax.models.transformer import INITIAL_SCALE, normal
from rwkv_kernels import wkv7


class DeltaNetState(NamedTuple):
    """State of a block."""

    inputs: Array
    """[B, 3, 3 C], the last inputs of the convolutions of queries, keys and values."""
    memory: Array
    """[B, H, N, N], value axis first."""


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, state: Array, operator: Callable[..., Any] = wkv7
) -> tuple[Array, Array]:
    """S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, read as y_t = S_t q_t.

    Args:
      q, k: [B, T, H, N], the keys of unit length; v: [B, T, H, M]; beta: [B, T, H].
      state: [B, H, M, N].
      operator: WKV-7, without decay here, with all that is bound to it.

    Returns:
      y [B, T, H, M] and the next state.
    """
    beta = beta[..., None].astype(v.dtype)
    log_w = jnp.zeros(k.shape, state.dtype)
    return operator(*checkpoint_wkv_inputs(q, log_w, k, beta * v, -k, beta * k), state)


class DeltaMix(BaselineMixer):
    """Queries, keys and values by matrices and short convolutions, the delta rule, a norm over each head.

    Initial values: matrices normal with the Transformer's standard deviation, convolutions PyTorch's.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads, dtype = config.width, config.num_heads, config.parameter_dtype
        self.query, self.key, self.value = (self.square(rngs) for _ in range(3))
        self.convolution = ShortConvolution(3 * width, dtype, rngs=rngs)
        self.beta = Linear(normal(rngs.params(), (heads, width), INITIAL_SCALE, dtype))
        self.ln_x = HeadRMSNorm(config.head_dim, dtype)
        self.output = self.writing(rngs)

    @override
    def mix(self, x: Array, *, state: DeltaNetState, context: SequenceContext) -> MixOutput:
        config = self.config
        qkv = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        qkv, inputs = self.convolution(qkv, state.inputs, context)
        q, k, v = rearrange(qkv, "B T (three H N) -> three B T H N", three=3, N=config.head_dim)
        q, k = unit_length(q) / math.sqrt(config.head_dim), unit_length(k)
        beta = jax.nn.sigmoid(self.beta(x).astype(config.parameter_dtype))
        if config.negative_eigenvalues:
            beta = 2 * beta
        operator = wkv_operator(wkv7, context, config.wkv_implementation)
        y, memory = delta_rule(q, k, v, beta, state.memory, operator)
        return MixOutput(self.output(self.ln_x(y)), DeltaNetState(inputs, memory))


class DeltaNetBlock(BaselineBlock):
    """A block of DeltaNet."""

    time_mix_type = DeltaMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.{name}.weight": ("heads", "embed") for name in ("query", "key", "value", "beta")},
    "att.convolution.weight": (None, None),
    "att.ln_x.weight": (None,),
    "att.output.weight": ("embed", "heads"),
    **FEED_FORWARD_AXES,
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class DeltaNet(Baseline):
    """A DeltaNet language model: `model(tokens, state) -> (logits, state)`."""

    block_type = DeltaNetBlock
    block_axes = BLOCK_AXES
    state_type = DeltaNetState
