"""GLA: linear attention whose state decays by channel, as the data say, with an output gate.

Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), and
flash-linear-attention's layer. The recurrence is WKV-6's but for the present token, which WKV-6 reads through a bonus
instead of the state. Shape letters: B batch, T time, C width, H heads, N key size, M value size = 2 N, D low rank.
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
from rwkv_jax.config.generations.gla import GATE_RANK
from rwkv_jax.models.baseline import FEED_FORWARD_AXES, Baseline, BaselineBlock, BaselineMixer, HeadRMSNorm
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import (
    Linear,
    MixOutput,
    broadcast_param,
    checkpoint_wkv_inputs,
    low_rank,
    wkv_operator,
)
from rwkv_jax.models.transformer import INITIAL_SCALE, normal
from rwkv_kernels import wkv6

DECAY_TEMPERATURE = 16
"""log alpha = log sigmoid(.) / DECAY_TEMPERATURE, so that states decay slowly at first."""


class GLAState(NamedTuple):
    """State of a block."""

    memory: Array
    """[B, H, M, N], value axis first."""


def gated_linear_attention(
    q: Array, k: Array, v: Array, log_alpha: Array, state: Array, operator: Callable[..., Any] = wkv6
) -> tuple[Array, Array]:
    """S_t = S_{t-1} diag(alpha_t) + v_t k_t^T, read as y_t = S_t q_t = S_{t-1} (alpha_t q_t) + (q_t . k_t) v_t.

    Args:
      q, k: [B, T, H, N]; v: [B, T, H, M]; log_alpha: [B, T, H, N], at most 0.
      state: [B, H, M, N].
      operator: WKV-6, without bonus here, with all that is bound to it. It takes any decay.

    Returns:
      y [B, T, H, M] and the next state.
    """
    r = q * jnp.exp(log_alpha).astype(q.dtype)
    no_bonus = jnp.zeros(q.shape[2:], state.dtype)
    y, state = operator(*checkpoint_wkv_inputs(r, log_alpha, k, v), no_bonus, state)
    own = jnp.einsum("BTHN,BTHN->BTH", q, k, precision=jax.lax.Precision.HIGHEST)
    return y + own[..., None] * v, state


class GatedLinearAttention(BaselineMixer):
    """Queries, keys, values and decays by matrices, the recurrence, a gated norm over each head.

    Initial values: matrices normal with the Transformer's standard deviation, the decay's bias 0.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, half, dtype = config.width, config.width // 2, config.parameter_dtype

        def drawn(*shape: int) -> Array:
            return normal(rngs.params(), shape, INITIAL_SCALE, dtype)

        self.query, self.key = (Linear(drawn(half, width)) for _ in range(2))
        self.value, self.gate = (self.square(rngs) for _ in range(2))
        self.a1, self.a2 = nnx.Param(drawn(width, GATE_RANK)), nnx.Param(drawn(GATE_RANK, half))
        self.a0 = nnx.Param(jnp.zeros((half,), dtype))
        self.ln_x = HeadRMSNorm(config.head_dim, dtype)
        self.output = self.writing(rngs)

    @override
    def mix(self, x: Array, *, state: GLAState, context: SequenceContext) -> MixOutput:
        config = self.config

        def split_heads(x: Array) -> Array:
            return rearrange(x, "B T (H N) -> B T H N", H=config.num_heads)

        q, k, v, g = map(split_heads, (self.query(x), self.key(x), self.value(x), self.gate(x)))
        q = q / math.sqrt(q.shape[-1])
        log_alpha = low_rank(x, self.a1[...], self.a2[...]).astype(config.parameter_dtype)
        log_alpha = log_alpha + broadcast_param(self.a0[...], log_alpha)
        log_alpha = split_heads(jax.nn.log_sigmoid(log_alpha) / DECAY_TEMPERATURE)
        operator = wkv_operator(wkv6, context, config.wkv_implementation)
        y, memory = gated_linear_attention(q, k, v, log_alpha, state.memory, operator)
        return MixOutput(self.output(self.ln_x(y, g)), GLAState(memory))


class GLABlock(BaselineBlock):
    """A block of GLA."""

    time_mix_type = GatedLinearAttention


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.{name}.weight": ("heads", "embed") for name in ("query", "key", "value", "gate")},
    "att.a0": ("heads",),
    "att.a1": ("embed", None),
    "att.a2": (None, "low_rank_heads"),
    "att.ln_x.weight": (None,),
    "att.output.weight": ("embed", "heads"),
    **FEED_FORWARD_AXES,
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class GLA(Baseline):
    """A GLA language model: `model(tokens, state) -> (logits, state)`."""

    block_type = GLABlock
    block_axes = BLOCK_AXES
    state_type = GLAState
