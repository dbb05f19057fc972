"""What the baselines share: the Transformer's block with another mixer, short convolutions, norms of heads, states.

A baseline's file has its mixer, as its paper and official code have it. Everything around the mixer is the
Transformer's (`models/transformer.py`): x + mix(norm(x)), then x + feed_forward(norm(x)), and the initial values of
what they share. A comparison is then between mixers only.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.config.generations.baseline import CONVOLUTION_SIZE
from rwkv_jax.models.block import BlockOutput
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import Axes, LanguageModel
from rwkv_jax.models.layers import Linear, Mixer, broadcast_param, uniform, wide_dtype
from rwkv_jax.models.transformer import INITIAL_SCALE, TransformerBlock, normal
from rwkv_kernels.arguments import segment_index

FEED_FORWARD_AXES: dict[str, Axes] = {"ffn.key.weight": ("ffn", "embed"), "ffn.value.weight": ("embed", "ffn")}
"""Logical axes of the feed-forward network's parameters."""


class BaselineMixer(Mixer):
    """Base of the baselines' mixers."""

    @override
    def initial_state(self, batch_size: int) -> Any:
        return self.config.spec.load_model_class().initial_block_state(self.config, batch_size)

    def square(self, rngs: nnx.Rngs) -> Linear:
        """A matrix [C, C] with the Transformer's initial values."""
        width, dtype = self.config.width, self.config.parameter_dtype
        return Linear(normal(rngs.params(), (width, width), INITIAL_SCALE, dtype))

    def writing(self, rngs: nnx.Rngs) -> Linear:
        """The same for one that writes the residual stream."""
        width, dtype = self.config.width, self.config.parameter_dtype
        scale = INITIAL_SCALE / math.sqrt(2 * self.config.num_layers)
        return Linear(normal(rngs.params(), (width, width), scale, dtype))


class BaselineBlock(TransformerBlock):
    """A residual block: the mixer, then the feed-forward network, each after a layer norm."""

    scope = "time_mix"

    @override
    def __call__(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> BlockOutput:
        for name in ("tensor", "sequence"):
            if (axis := getattr(context.axes, name)) is not None:
                title = self.att.config.spec.a_title
                raise ConfigError(f"axes.{name} = {axis!r}: {title} is split over rows only; use other axes")
        return super().__call__(x=x, state=state, v_first=v_first, context=context)


class Baseline(LanguageModel):
    """A language model whose state is a NamedTuple of arrays a block, zeros at the start of a text."""

    state_type: ClassVar[type[Any]]
    """The NamedTuple, with the arrays of the spec's `state` in their order."""

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        del axes  # no array is split
        return cls.state_type(*(jnp.zeros((batch_size, *x.shape), x.dtype) for x in config.spec.state(config)))

    @override
    @classmethod
    def initial_embedding(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        return normal(rngs.params(), (config.vocab_size, config.width), INITIAL_SCALE, config.parameter_dtype)

    @override
    @classmethod
    def initial_head(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        return normal(rngs.params(), (config.vocab_size, config.width), INITIAL_SCALE, config.parameter_dtype)

    @override
    @classmethod
    def replicate_state(cls, state: Any, axes: MeshAxes) -> Any:
        del axes
        return state


class ShortConvolution(nnx.Module):
    """A causal convolution of each channel with its last CONVOLUTION_SIZE inputs, then SiLU.

    Weight [D, CONVOLUTION_SIZE], the oldest input first, and bias [D] or None, as in PyTorch's Conv1d, which also has
    these initial values: uniform within +- 1 / sqrt(CONVOLUTION_SIZE).
    """

    def __init__(self, channels: int, dtype: str, *, rngs: nnx.Rngs, has_bias: bool = False) -> None:
        bound = 1 / math.sqrt(CONVOLUTION_SIZE)
        self.weight = nnx.Param(uniform(rngs.params(), (channels, CONVOLUTION_SIZE), bound, dtype))
        self.bias = nnx.Param(uniform(rngs.params(), (channels,), bound, dtype)) if has_bias else None

    def __call__(self, x: Array, before: Array, context: SequenceContext) -> tuple[Array, Array]:
        """The convolution of each text by itself.

        Args:
          x: [B, T, D]; before: [B, CONVOLUTION_SIZE - 1, D], the inputs before it, zeros at the start of a text.

        Returns:
          y [B, T, D], and the last inputs of each row's last text.
        """
        weight, time, wide = self.weight[...], x.shape[1], wide_dtype(x.dtype)
        segments = segment_index(context.segment_ids, context.lengths, x.shape[0], x.shape[1])
        seen = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        ids = None if segments is None else jnp.pad(segments, ((0, 0), (CONVOLUTION_SIZE - 1, 0)))
        y = jnp.zeros(x.shape, wide)
        for tap in range(CONVOLUTION_SIZE):
            own = seen[:, tap : tap + time].astype(wide)
            if ids is not None:
                own = jnp.where((ids[:, tap : tap + time] == segments)[:, :, None], own, 0)
            y = y + own * broadcast_param(weight[:, tap], own)
        if self.bias is not None:
            y = y + broadcast_param(self.bias[...], y)
        return jax.nn.silu(y).astype(x.dtype), self._last(seen, ids, context.lengths)

    @staticmethod
    def _last(seen: Array, ids: Array | None, lengths: Array | None) -> Array:
        """The last inputs [B, CONVOLUTION_SIZE - 1, D] of each row's last text, zeros where it has fewer."""
        end = jnp.full(len(seen), seen.shape[1] - CONVOLUTION_SIZE + 1) if lengths is None else lengths
        index = end[:, None] + jnp.arange(CONVOLUTION_SIZE - 1)
        last = jnp.take_along_axis(seen, index[:, :, None], axis=1)
        if ids is None:
            return last
        own = jnp.take_along_axis(ids, index, axis=1)
        return jnp.where((own == own[:, -1:])[:, :, None], last, 0)


class HeadRMSNorm(nnx.Module):
    """Each head divided by its root mean square, times a weight [N] that all heads share, and a gate's SiLU."""

    epsilon = 1e-5

    def __init__(self, size: int, dtype: str) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, y: Array, gate: Array | None = None) -> Array:
        """y [B, T, H, N], gate [B, T, H, N] -> [B, T, H N] in y's dtype, computed in at least float32."""
        x = y.astype(wide_dtype(y.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * broadcast_param(self.weight[...], x)
        if gate is not None:
            x = x * jax.nn.silu(gate.astype(x.dtype))
        return rearrange(x.astype(y.dtype), "B T H N -> B T (H N)")


def unit_length(x: Array) -> Array:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in at least float32 and back."""
    wide = x.astype(wide_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def initial_time_steps(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """softplus^{-1}(dt), with dt log-uniform in [0.001, 0.1): how much time passes at a token, as Mamba-2 has it."""
    low, high = math.log(0.001), math.log(0.1)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.dtype(dtype), low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
