"""RWKV-7 with ROSA: a layer adds what its time mixing and its lookups make of the same stream, each after its own norm.

    x = x + att(ln1(x)) + rosa(ln3(x))        x = x + ffn(ln2(x))

There is no norm of the embedding. Source: RWKV-LM, RWKV-v8/251105_reverse_run.py, where the norms are ln_a, ln_c and
ln_b, and the head has a bias, which `rwkv_jax/weights/rosa_demo.py` adds to the last norm's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.block import BlockOutput, TimeMixOutput
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import LanguageModel
from rwkv_jax.models.layers import LayerNorm, as_replicated, copy_to_tensor_parallel
from rwkv_jax.models.rosa import ROSA_AXES, empty_lookups
from rwkv_jax.models.rosa import TimeMix as RosaMix
from rwkv_jax.models.rwkv7 import BLOCK_AXES as RWKV7_AXES
from rwkv_jax.models.rwkv7 import RWKV7, ChannelMix, RWKV7Block, TimeMix
from rwkv_jax.models.state import State, TimeMixState, zeros_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RosaBesideState(State):
    """State of a block; in a model's state each array has a leading axis L."""

    rosa_shift: Array
    """[B, C], the last input of ROSA."""
    lookups: Any
    """`RosaState` of its lookups."""

    @property
    def rosa(self) -> TimeMixState:
        """The part for ROSA."""
        return TimeMixState(self.rosa_shift, self.lookups, generation=self.generation)


class RWKV7RosaBlock(RWKV7Block):
    """A residual block: time mixing beside ROSA, then channel mixing, each after a layer norm of its own."""

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.is_first = isinstance(layer, int) and layer == 0
        self.ln1, self.ln2, self.ln3 = (LayerNorm(config.width, config.parameter_dtype) for _ in range(3))
        self.att = TimeMix(config, layer, rngs=rngs)
        self.rosa = RosaMix(config, layer, rngs=rngs)
        self.ffn = ChannelMix(config, layer, rngs=rngs)

    @override
    def mix_branch(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> TimeMixOutput:
        y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
        return self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)

    @override
    def __call__(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> BlockOutput:
        axis = context.axes.tensor
        with jax.named_scope("time_mix"):
            looked_up, rosa = self.rosa.mix(
                copy_to_tensor_parallel(self.ln3(x), axis), state=state.rosa, context=context
            )
            y = copy_to_tensor_parallel(self.ln1(x), axis)
            y, v_first, att = self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)
            x = x + y + looked_up
        with jax.named_scope("channel_mix"):
            y, ffn_shift = self.ffn.mix(
                copy_to_tensor_parallel(self.ln2(x), axis), state=state.ffn_shift, context=context
            )
            x = x + y
        after = RosaBesideState(
            att.shift, ffn_shift, att.wkv, rosa_shift=rosa.shift, lookups=rosa.wkv, generation=state.generation
        )
        return BlockOutput(x, v_first, after)


class RWKV7Rosa(LanguageModel):
    """A language model of RWKV-7 with ROSA: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV7RosaBlock
    block_axes = RWKV7_AXES | ROSA_AXES
    learning_rate_factors = RWKV7.learning_rate_factors

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> RosaBesideState:
        shift, _, matrix, *_ = config.spec.state(config)
        zeros = zeros_of(shift, batch_size, axes)
        return RosaBesideState(
            zeros,
            zeros,
            zeros_of(matrix, batch_size, axes),
            rosa_shift=zeros,
            lookups=empty_lookups(config, batch_size, axes),
            generation=config.generation,
        )

    @override
    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """Without lookups, since there is nothing to look back on."""
        state = self.initial_state(batch_size, axes)
        if self.is_stacked:
            return dataclasses.replace(state, lookups=None)
        return tuple(dataclasses.replace(of_layer, lookups=None) for of_layer in state)

    @override
    @classmethod
    def replicate_state(cls, state: Any, axes: MeshAxes) -> Any:
        own = super().replicate_state(state, axes)
        return dataclasses.replace(own, rosa_shift=as_replicated(own.rosa_shift, axes.tensor))
