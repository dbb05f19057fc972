"""Attention or RWKV-7's time mixing in the layers of one model: `ModelConfig.rwkv_layers`.

A block's norms and feed-forward network are those of its architecture; what mixes tokens between them is the
architecture's attention, or `TimeMix` of rwkv7.py as it stands there. The value residual of time mixing takes the
values of layer 0, be they those of attention or of time mixing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.generations import HYBRID_KINDS, RWKV_LAYER, time_mix_config
from rwkv_jax.models.block import Block, TimeMixOutput
from rwkv_jax.models.cached import CachedModel
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import as_replicated
from rwkv_jax.models.rwkv7 import BLOCK_AXES as RWKV7_AXES
from rwkv_jax.models.rwkv7 import RWKV7, TimeMix
from rwkv_jax.models.state import TimeMixState

TIME_MIX_AXES: dict[str, Axes] = {name: axes for name, axes in RWKV7_AXES.items() if name.startswith("att.")}
"""Logical axes of the parameters of time mixing."""


class HybridState(NamedTuple):
    """State of a model in whose layers there is time mixing; each array has a leading axis: the layers of its kind."""

    attention: Any
    """Cache of the layers with attention; None if there are none, or, at the start of a text, for an empty one."""
    recurrence: Any
    """`TimeMixState` of the layers with time mixing."""


class HybridBlock(Block):
    """A residual block whose `att` is attention, or RWKV-7's time mixing."""

    gives_values: bool
    """Whether its attention's values are those that time mixing of later layers takes."""

    def set_mixer(self, config: ModelConfig, kind: str, layer: int | Array, rngs: nnx.Rngs) -> None:
        """Draws `att`: time mixing of this layer, or an instance of `time_mix_type`."""
        has_attention = kind != RWKV_LAYER
        self.gives_values = has_attention and isinstance(layer, int) and bool(config.rwkv_layers)
        if has_attention:
            self.att = self.time_mix_type(config, rngs=rngs)
        else:
            self.att = TimeMix(time_mix_config(config), layer, rngs=rngs)


def mix_tokens(
    block: HybridBlock, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext
) -> TimeMixOutput:
    """Attention or time mixing of a block, on normalized x [B, T, C]; the first layer's values go on.

    (No method, which nnx.tabulate would list in the place of the block.)
    """
    if isinstance(block.att, TimeMix):
        return block.att.mix_with_residual(x, state=state, v_first=v_first, context=context)
    if block.gives_values:
        v_first = block.att.values(x)
    y, state = block.att.mix(x=x, state=state, context=context)  # x by name, for nnx.tabulate
    return TimeMixOutput(y, v_first, state)


class HybridModel(CachedModel):
    """Base of models with attention, which RWKV-7's time mixing may replace."""

    block_type: ClassVar[Any]
    """A `HybridBlock` with a further argument `kind`."""

    learning_rate_factors: ClassVar[dict[str, float]] = RWKV7.learning_rate_factors

    @classmethod
    def empty_cache(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of one block with attention, whose `position` counts tokens."""
        raise NotImplementedError

    @override
    @classmethod
    def new_block(cls, config: ModelConfig, kind: str, layer: int | Array, rngs: nnx.Rngs) -> Block:
        return cls.block_type(config, layer, rngs=rngs, kind=kind)

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The cache of one block, in a hybrid with the state of one block of time mixing."""
        if not config.rwkv_layers:
            return cls.empty_cache(config, batch_size, axes)
        recurrence = RWKV7.initial_block_state(time_mix_config(config), batch_size, axes).time_mix
        has_attention = len(config.rwkv_layers) < config.num_layers
        return HybridState(cls.empty_cache(config, batch_size, axes) if has_attention else None, recurrence)

    @override
    @classmethod
    def states_by_kind(cls, state: Any) -> dict[str, Any]:
        return dict(zip(HYBRID_KINDS, state, strict=True)) if isinstance(state, HybridState) else {"": state}

    @override
    @classmethod
    def join_kinds(cls, states: dict[str, Any]) -> Any:
        return states[""] if "" in states else HybridState(*(states.get(kind) for kind in HYBRID_KINDS))

    @override
    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """No cache, since there is nothing to read: a training step then computes none."""
        if not self.config.rwkv_layers:
            return None if self.is_stacked else (None,) * self.config.num_layers
        state = self.initial_state(batch_size, axes)
        if self.is_stacked:
            return state._replace(attention=None)
        return tuple(of_layer if isinstance(of_layer, TimeMixState) else None for of_layer in state)

    @override
    @classmethod
    def replicate_state(cls, state: Any, axes: MeshAxes) -> Any:
        """A cache stays as it is: its positions would be marked as replicated."""
        if isinstance(state, HybridState):
            return state._replace(recurrence=cls.replicate_state(state.recurrence, axes))
        if not isinstance(state, TimeMixState):
            return state
        return dataclasses.replace(state, shift=as_replicated(state.shift, axes.tensor))
