"""A residual block: time mixing, then channel mixing, each after a layer norm."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jax import Array

from rwkv_jax.config import ModelConfig, Remat
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.layers import CHECKPOINT_MATMUL, CHECKPOINT_WKV_INPUT, LayerNorm, copy_to_tensor_parallel
from rwkv_jax.models.state import State, TimeMixState

SAVED_BY_REMAT: dict[Remat, tuple[str, ...]] = {
    "none": (CHECKPOINT_MATMUL, "wkv"),
    "operator": (CHECKPOINT_WKV_INPUT, "wkv"),
    "full": (),
}
"""Checkpoint policy of a block, which also stores its input: matrix products, the operator's inputs, nothing."""


class TimeMixOutput(NamedTuple):
    """Output of a block's time mixing."""

    y: Array
    """[B, T, C]."""
    v_first: Any
    """What layer 0 hands on to all others: RWKV-7's values [B, T, C], RWKV-7a's `FromFirst`; None in other models."""
    state: TimeMixState
    """The next state."""


class BlockOutput(NamedTuple):
    """Output of a block."""

    x: Array
    """[B, T, C], the residual stream."""
    v_first: Any
    """What layer 0 hands on to all others: RWKV-7's values [B, T, C], RWKV-7a's `FromFirst`; None in other models."""
    state: Any
    """The next state."""


class Block(nnx.Module):
    """A residual block of layer l: time mixing, then channel mixing, each after a layer norm."""

    time_mix_type: ClassVar[type[Any]]
    """A `Mixer`."""
    channel_mix_type: ClassVar[type[Any]]
    """A `Mixer`."""

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        dtype = config.parameter_dtype
        # A traced layer index belongs to a stacked layer, never to the first.
        self.is_first = isinstance(layer, int) and layer == 0
        if self.is_first:
            self.ln0 = LayerNorm(config.width, dtype)
        self.ln1 = LayerNorm(config.width, dtype)
        self.ln2 = LayerNorm(config.width, dtype)
        self.att = self.time_mix_type(config, layer, rngs=rngs)
        self.ffn = self.channel_mix_type(config, layer, rngs=rngs)

    def mix_time(
        self, x: Array, *, state: TimeMixState, v_first: Array | None, context: SequenceContext, att: Any = None
    ) -> TimeMixOutput:
        """Time mixing with the model's arguments; only RWKV-7 uses `v_first`, the first layer's values.

        Args:
          att: the time mixing; None is the block's own.
        """
        y, state = (self.att if att is None else att).mix(x, state=state, context=context)
        return TimeMixOutput(y, v_first, state)

    def mix_branch(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> TimeMixOutput:
        """The branch of time mixing on the residual stream x [B, T, C], not yet added to it; any block's state."""
        if self.is_first:
            x = self.ln0(x)
        y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
        return self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)

    def __call__(self, x: Array, *, state: Any, v_first: Any, context: SequenceContext) -> BlockOutput:
        """x [B, T, C], the block's state, what layer 0 handed on -> the same three, after the block."""
        return self.add_branches(self.ln0(x) if self.is_first else x, state=state, v_first=v_first, context=context)

    def add_branches(self, x: Array, *, state: Any, v_first: Any, context: SequenceContext) -> BlockOutput:
        """The block of x after layer 0's norm of the embedding, if it is layer 0."""
        with jax.named_scope("time_mix"):
            y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
            y, v_first, att = self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)
            x = x + y
        with jax.named_scope("channel_mix"):
            y = copy_to_tensor_parallel(self.ln2(x), context.axes.tensor)
            y, ffn_shift = self.ffn.mix(y, state=state.ffn_shift, context=context)
            x = x + y
        return BlockOutput(x, v_first, State(att.shift, ffn_shift, att.wkv, generation=state.generation))
