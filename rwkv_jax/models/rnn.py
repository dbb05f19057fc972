"""A tanh RNN: h_t = tanh(W x_t + b + U h_{t-1} + c), one token after the other.

Source: Finding Structure in Time (Elman, 1990), and PyTorch's RNN for initial values. A matrix O reads it into the
residual stream. Shape letters: B batch, T time, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.baseline import FEED_FORWARD_AXES, Baseline, BaselineBlock, BaselineMixer
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import Linear, MixOutput, broadcast_param, uniform
from rwkv_kernels.arguments import broadcast_varying_axes, is_active, segment_index, segment_starts


class RNNState(NamedTuple):
    """State of a block."""

    hidden: Array
    """[B, C]."""


def scan_tokens(
    step: Callable[[Any, Array], tuple[Any, Array]], x: Array, state: Any, context: SequenceContext
) -> tuple[Array, Any]:
    """Runs `step` over the tokens of each text: y [B, T, ...] and the last state of each row.

    Args:
      step: the state before a token and the token's x [B, ...] -> the state after it and y.
      x: [B, T, ...]; state: a tree of arrays [B, C], of which a new text has zeros.
    """
    segments = segment_index(context.segment_ids, context.lengths, x.shape[0], x.shape[1])
    starts = None if segments is None else segment_starts(segments)
    active = None if context.lengths is None else is_active(context.lengths, x.shape[1])

    def body(state: Any, token: tuple[Array, Array | None, Array | None]) -> tuple[Any, Array]:
        x, starts, active = token
        if starts is not None:
            begins = starts[:, None]
            state = jax.tree.map(lambda s: jnp.where(begins, 0, s), state)
        after, y = step(state, x)
        if active is not None:
            counts = active[:, None]
            after = jax.tree.map(lambda new, old: jnp.where(counts, new, old), after, state)
        return after, y

    state, _ = broadcast_varying_axes(state, x)
    time_first = jax.tree.map(lambda z: z.swapaxes(0, 1), (x, starts, active))
    state, y = lax.scan(body, state, time_first)
    return y.swapaxes(0, 1), state


class RecurrentMixer(BaselineMixer):
    """What RNN and LSTM have in common: matrices of inputs and hidden units, two biases, and an output matrix.

    Initial values: PyTorch's, uniform within +- 1 / sqrt(C); the output is the Transformer's.
    """

    num_gates = 1

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dtype = config.width, config.parameter_dtype

        def drawn(*shape: int) -> Array:
            return uniform(rngs.params(), (self.num_gates * width, *shape), 1 / math.sqrt(width), dtype)

        self.input, self.recurrent = (Linear(drawn(width)) for _ in range(2))
        self.input_bias, self.recurrent_bias = (nnx.Param(drawn()) for _ in range(2))
        self.output = self.writing(rngs)

    def inputs(self, x: Array) -> Array:
        """W x + b + c for all tokens at once, in at least float32: [B, T, gates C]."""
        projected = self.input(x).astype(self.config.parameter_dtype)
        return projected + broadcast_param(self.input_bias[...] + self.recurrent_bias[...], projected)

    def read(self, hidden: Array, x: Array) -> Array:
        """O h in x's dtype."""
        # Stored for the backward pass under RWKV's name for the output of token mixing.
        return self.output(checkpoint_name(hidden.astype(x.dtype), "wkv"))


class RNNMix(RecurrentMixer):
    """The recurrence, and the matrix that reads it."""

    @override
    def mix(self, x: Array, *, state: RNNState, context: SequenceContext) -> MixOutput:
        def step(state: RNNState, token: Array) -> tuple[RNNState, Array]:
            recurrent = self.recurrent(state.hidden.astype(x.dtype)).astype(token.dtype)
            hidden = jnp.tanh(token + recurrent)
            return RNNState(hidden), hidden

        hidden, state = scan_tokens(step, self.inputs(x), state, context)
        return MixOutput(self.read(hidden, x), state)


class RNNBlock(BaselineBlock):
    """A block of the RNN."""

    time_mix_type = RNNMix


BLOCK_AXES: dict[str, Axes] = {
    **{f"att.{name}.weight": (None, "embed") for name in ("input", "recurrent")},
    **{f"att.{name}_bias": (None,) for name in ("input", "recurrent")},
    "att.output.weight": ("embed", None),
    **FEED_FORWARD_AXES,
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class RNN(Baseline):
    """A language model of tanh RNNs: `model(tokens, state) -> (logits, state)`."""

    block_type = RNNBlock
    block_axes = BLOCK_AXES
    state_type = RNNState
