"""The recurrent state that a model carries from one token to the next: the same fields in every generation.

`wkv` is float32 (float64 in a float64 model) whatever the compute dtype. RWKV-5, 6 and 7 have a matrix per head,
[B, H, N, N] with the value axis before the key axis; RWKV-4 has (numerator, denominator, max_exponent), each [B, C].
The generation is static data of the pytree: states of equal shapes but different meaning cannot be confused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.config.generations import StateArray
from rwkv_jax.models.context import UNSHARDED, MeshAxes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeMixState:
    """State of time mixing."""

    shift: Array
    """[B, C], the last input."""
    wkv: Any
    """State of the recurrence."""
    generation: str = dataclasses.field(metadata={"static": True}, kw_only=True)
    """`ModelConfig.generation` of the model that it belongs to."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of a block; in a model's state each array has a leading axis L."""

    att_shift: Array
    """[B, C], the last input of time mixing."""
    ffn_shift: Array
    """[B, C], the last input of channel mixing."""
    wkv: Any
    """State of the recurrence."""
    generation: str = dataclasses.field(metadata={"static": True}, kw_only=True)
    """`ModelConfig.generation` of the model that it belongs to."""

    @property
    def time_mix(self) -> TimeMixState:
        """The part for time mixing."""
        return TimeMixState(self.att_shift, self.wkv, generation=self.generation)


def zeros_of(array: StateArray, batch_size: int, axes: MeshAxes = UNSHARDED) -> Array:
    """An array of an empty state, of which a shard has its heads: [B, ...]."""
    sizes = zip(array.shape, array.axes, strict=True)
    own = (size // axes.num_tensor_shards if axis == "heads" else size for size, axis in sizes)
    return jnp.zeros((batch_size, *own), array.dtype)


def check_state(state: Any, expected: Any, *, owner: str, source: str) -> None:
    """Checks a state against the initial state of a model or layer.

    Args:
      expected: arrays or their shapes.
      owner: the name of the model that the state is for.
      source: the call that returns such a state, for the message.

    Raises:
      ValueError: a state of another generation or structure, or of another model or batch: another shape.
    """
    if jax.tree.structure(state) != jax.tree.structure(expected):
        others = sorted(_generations(state) - _generations(expected))
        found = f"; it is one of RWKV-{', '.join(others)}" if others else ""
        raise ValueError(f"state: is none of {owner}, whose states have the form of {source}{found}")
    for (path, leaf), like in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        if leaf.shape != like.shape:
            raise ValueError(f"state{jax.tree_util.keystr(path)}: shape {leaf.shape} must be {like.shape}")


def _generations(state: Any) -> set[str]:
    def is_part(x: Any) -> bool:
        return isinstance(x, (State, TimeMixState))

    return {part.generation for part in jax.tree.leaves(state, is_leaf=is_part) if is_part(part)}
