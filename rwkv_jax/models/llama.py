"""Llama 2 and 3, Qwen2 and Qwen3: the Transformers from which RWKV learns, as their weights were trained.

Every block is x + attention(norm(x)), then x + feed_forward(norm(x)). Sources: Llama (arXiv 2302.13971), for norms,
rotary positions and SwiGLU; Llama 2 (arXiv 2307.09288), for grouped keys and values; Llama 3 (arXiv 2407.21783), whose
code stretches slow rotations for longer contexts; Qwen2 (arXiv 2407.10671), which has biases of queries, keys and
values; Qwen3 (arXiv 2505.09388), which normalizes queries and keys instead. What is not theirs, attention over a call
and a cache, packed texts and ragged rows, is the Transformer's (`models/transformer.py`), and so are initial values.

Parameters have the names that RWKV's have for the same thing, and are as in the files that `weights/hugging_face.py`
reads. Shape letters: B batch, T time, C width, H heads of queries, G heads of keys and values, N head size, F
feed-forward width, L layers, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.layers import BiasedLinear, Linear, broadcast_param, row_parallel_linear, wide_dtype
from rwkv_jax.models.transformer import (
    BLOCK_AXES,
    INITIAL_SCALE,
    Attention,
    AttentionModel,
    TransformerBlock,
    normal,
    rotary_frequencies,
    rotate,
    split_heads,
)


class RMSNorm(nnx.Module):
    """x divided by its root mean square over the last axis, times a weight [C]; computed in at least float32."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        self.epsilon = config.sizes().norm_epsilon
        self.weight = nnx.Param(jnp.ones((size,), config.parameter_dtype))

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C] in x's dtype."""
        y = x.astype(wide_dtype(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * broadcast_param(self.weight[...], y)).astype(x.dtype)


def stretched_frequencies(config: ModelConfig) -> NDArray:
    """theta_i of each pair of channels, [N / 2] in float64, with `config.rotary_scaling`.

    Wavelengths above original / low_freq_factor grow by `factor`, those below original / high_freq_factor stay, and
    between them the share of what grows changes linearly with the frequency.
    """
    theta = rotary_frequencies(config.head_dim, config.sizes().rotary_base)
    if config.rotary_scaling is None:
        return theta
    factor, low, high, original = config.rotary_scaling
    turns = original * theta / (2 * math.pi)  # of a text of the original length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * theta + (1 - kept) * theta / factor


class GroupedAttention(Attention):
    """Causal self-attention of H heads, of which each H / G share keys and values.

    q = norm(Q x + b_q), k = norm(K x + b_k), v = V x + b_v       norms and biases where the config has them
    y = O softmax(R q . R k / sqrt(N)) v                          R rotates pairs of channels by the position
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, head_dim, dtype = config.width, config.head_dim, config.parameter_dtype

        def projection(heads: int) -> Linear:
            weight = normal(rngs.params(), (heads * head_dim, width), INITIAL_SCALE, dtype)
            return BiasedLinear(weight) if config.qkv_bias else Linear(weight)

        self.query = projection(config.num_heads)
        self.key, self.value = projection(config.num_kv_heads), projection(config.num_kv_heads)
        if config.qk_norm:
            self.ln_query, self.ln_key = RMSNorm(head_dim, config), RMSNorm(head_dim, config)
        scale = INITIAL_SCALE / math.sqrt(2 * config.num_layers)
        self.output = Linear(normal(rngs.params(), (width, config.num_heads * head_dim), scale, dtype))

    @override
    def values(self, x: Array) -> Array:
        """[B, T, H N], each group's values repeated for its queries."""
        v = split_heads(self.value(x), self.config.head_dim)
        repeated = jnp.repeat(v, self.config.num_heads // self.config.num_kv_heads, axis=2)
        return rearrange(repeated, "B T H N -> B T (H N)")

    @override
    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        projected = (project(x) for project in (self.query, self.key, self.value))
        q, k, v = (split_heads(z, self.config.head_dim) for z in projected)  # [B, T, H or G, N]
        if self.config.qk_norm:
            q, k = self.ln_query(q), self.ln_key(k)
        theta = stretched_frequencies(self.config)
        return rotate(q, positions, theta), rotate(k, positions, theta), v


class GatedFeedForward(nnx.Module):
    """SwiGLU: value (silu(gate x) * (key x)), three matrices named as in RWKV's channel mixing."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        self.gate = Linear(normal(rngs.params(), (ffn_width, width), INITIAL_SCALE, dtype))
        self.key = Linear(normal(rngs.params(), (ffn_width, width), INITIAL_SCALE, dtype))
        scale = INITIAL_SCALE / math.sqrt(2 * config.num_layers)
        self.value = Linear(normal(rngs.params(), (width, ffn_width), scale, dtype))

    def __call__(self, x: Array, tensor_axis: str | None = None) -> Array:
        """[B, T, C] -> [B, T, C]; a mesh axis may split the width between the matrices."""
        hidden = jax.nn.silu(self.gate(x)) * self.key(x)  # [B, T, F]
        return row_parallel_linear(hidden, self.value.weight[...], tensor_axis)


class LlamaBlock(TransformerBlock):
    """A residual block: attention, then the feed-forward network, each after a norm."""

    time_mix_type = GroupedAttention

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs, kind: str = "") -> None:
        self.ln1 = RMSNorm(config.width, config)
        self.ln2 = RMSNorm(config.width, config)
        self.set_mixer(config, kind, layer, rngs)
        self.ffn = GatedFeedForward(config, rngs=rngs)


class Llama(AttentionModel):
    """A language model as Llama, Qwen2 and Qwen3 are."""

    block_type = LlamaBlock
    block_axes = BLOCK_AXES | {
        **{f"att.{name}.bias": ("heads",) for name in ("query", "key", "value")},
        "att.ln_query.weight": (None,),
        "att.ln_key.weight": (None,),
        "ffn.gate.weight": ("ffn", "embed"),
    }

    @override
    @classmethod
    def last_norm(cls, config: ModelConfig) -> RMSNorm:
        return RMSNorm(config.width, config)
