"""Bidirectional models: each layer's time mixing reads its rows from both ends, in any generation from 4 to 7.

    forward     f = TimeMix(ln1 x)
    backward    b = reverse(TimeMix'(reverse(ln1 x))), with parameters of its own, `att_backward`
    joined      f + b, or W [f; b] with W [C, 2 C]

Every position then depends on all of its text, so there is no next token to predict and nothing to decode: such a model
encodes. Rows may have lengths or be packed, since reversing keeps the tokens of a text together. Channel mixing takes
the token before, as it does in one direction.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.block import Block, BlockOutput
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import LanguageModel
from rwkv_jax.models.layers import Linear, as_replicated, copy_to_tensor_parallel, orthogonal
from rwkv_jax.models.state import State, TimeMixState

Join = Literal["sum", "concatenate"]
"""How a layer's two directions become one."""

BACKWARD = "att_backward"
"""The name of the second time mixing in a block."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BidirectionalState:
    """The state of a block after both directions; in a model's state each array has a leading axis L."""

    forward: State
    """After the last token."""
    backward: TimeMixState
    """After the first token, which the second direction reads last."""


def reverse_rows(x: Array, lengths: Array | None) -> Array:
    """Rows [B, T, ...] in reverse order, of which those with lengths keep what is beyond them in place."""
    if lengths is None:
        return jnp.flip(x, axis=1)
    steps = jnp.arange(x.shape[1])[None]
    order = jnp.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def mean_over_rows(x: Array, lengths: Array | None) -> Array:
    """Mean of x [B, T, C] over each row's length, at least 1: [B, C]."""
    if lengths is None:
        return jnp.mean(x, axis=1)
    is_text = jnp.arange(x.shape[1])[None, :, None] < lengths[:, None, None]
    return jnp.sum(jnp.where(is_text, x, 0), axis=1) / jnp.maximum(lengths, 1)[:, None].astype(x.dtype)


def reverse_context(context: SequenceContext) -> SequenceContext:
    """The context of reversed rows; a grid of patches is turned by 180 degrees with them."""
    segment_ids = context.segment_ids
    if segment_ids is not None:
        segment_ids = reverse_rows(segment_ids, context.lengths)
    kernel = None if context.grid_kernel is None else jnp.flip(context.grid_kernel, axis=(0, 1))
    return dataclasses.replace(context, segment_ids=segment_ids, grid_kernel=kernel)


class BidirectionalBlock(Block):
    """A block whose time mixing reads rows from both ends; mixed in before a generation's block."""

    join: ClassVar[Join] = "sum"

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        setattr(self, BACKWARD, self.time_mix_type(config, layer, rngs=rngs))
        if self.join == "concatenate":
            shape = (config.width, 2 * config.width)
            self.join_weight = Linear(orthogonal(rngs.params(), shape, 1.0, config.parameter_dtype))

    @override
    def __call__(self, x: Array, *, state: BidirectionalState, v_first: Any, context: SequenceContext) -> BlockOutput:
        if context.axes.sequence is not None:
            raise ValueError("a bidirectional model reads rows from both ends: split rows or heads, not time")
        if self.is_first:
            x = self.ln0(x)
        values, values_back = (None, None) if v_first is None else v_first
        own, lengths = state.forward, context.lengths
        with jax.named_scope("time_mix"):
            y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
            forward, values, att = self.mix_time(y, state=own.time_mix, v_first=values, context=context)
            backward, values_back, back = self.mix_time(
                reverse_rows(y, lengths),
                state=state.backward,
                v_first=values_back,
                context=reverse_context(context),
                att=getattr(self, BACKWARD),
            )
            x = x + self._joined(forward, reverse_rows(backward, lengths))
        with jax.named_scope("channel_mix"):
            y = copy_to_tensor_parallel(self.ln2(x), context.axes.tensor)
            y, ffn_shift = self.ffn.mix(y, state=own.ffn_shift, context=context)
            x = x + y
        own = State(att.shift, ffn_shift, att.wkv, generation=own.generation)
        return BlockOutput(x, (values, values_back), BidirectionalState(own, back))

    def _joined(self, forward: Array, backward: Array) -> Array:
        if self.join == "sum":
            return forward + backward
        return self.join_weight(jnp.concatenate([forward, backward], axis=-1))


class _BothWays(LanguageModel):
    """What a bidirectional model has besides its generation's class."""

    @classmethod
    @override
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        own = super().initial_block_state(config, batch_size, axes)
        return BidirectionalState(own, own.time_mix)

    @classmethod
    @override
    def replicate_state(cls, state: Any, axes: MeshAxes) -> Any:
        back = state.backward
        back = dataclasses.replace(back, shift=as_replicated(back.shift, axes.tensor))
        return BidirectionalState(super().replicate_state(state.forward, axes), back)


@functools.cache
def bidirectional_type(config: ModelConfig, join: Join = "sum") -> type[LanguageModel]:
    """The bidirectional model of a generation; called like its class.

    Raises:
      ConfigError: a generation whose layers have more than time and channel mixing, or whose state is no `State`.
    """
    kind = config.spec.load_model_class()
    block = kind.block_type
    is_plain = block.__call__ is Block.__call__ and block.mix_branch is Block.mix_branch and not kind.reads_tokens
    if not is_plain or type(jax.eval_shape(lambda: kind.initial_block_state(config, 1))) is not State:
        raise ConfigError(
            f"model.generation = {config.generation!r}: {config.title}'s layers have more than time and channel "
            "mixing, and the rest has no second direction; take 4, 5.2, 6 or 7"
        )
    axes = dict(kind.block_axes)
    axes |= {name.replace("att.", f"{BACKWARD}.", 1): own for name, own in axes.items() if name.startswith("att.")}
    axes["join_weight.weight"] = ("embed", None)

    def subclass(name: str, bases: tuple[type, ...], **members: Any) -> Any:
        return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members))

    both = subclass(f"Bidirectional{block.__name__}", (BidirectionalBlock, block), join=join)
    about = f"{kind.__name__} that reads rows from both ends (models/bidirectional.py)."
    return subclass(f"Bidirectional{kind.__name__}", (_BothWays, kind), block_type=both, block_axes=axes, __doc__=about)
