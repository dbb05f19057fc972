"""The state in which every text begins, as trained parameters: what they are, and the model's state made of them.

    initial_state.first_block.wkv          [H, N, N], value axis before key axis, as in `rwkv_jax.models.state`
    initial_state.first_block.att_shift    [C], and ffn_shift, only if the token shifts' first inputs are not zeros
    initial_state.blocks.*                 the same of layers 1 to L - 1, with a leading axis

All are in float32, in a float64 model in float64. A text begins with them instead of zeros, so they cost nothing where
text is generated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.checks import ConfigError
from rwkv_jax.config import ModelConfig
from rwkv_jax.config.tuning import NO_MATRICES
from rwkv_jax.models.context import UNSHARDED, MeshAxes
from rwkv_jax.models.language_model import LanguageModel

MATRIX, SHIFTS = "wkv", ("att_shift", "ffn_shift")
"""Names of a layer's arrays."""

AXES = {MATRIX: ("heads", None, None)} | dict.fromkeys(SHIFTS, (None,))
"""Logical axes of each, as `LanguageModel.parameter_axes` has them."""


def state_shapes(config: ModelConfig, *, shifts: bool = False) -> Any:
    """Shapes of the parameters: a nested dict of `first_block` and `blocks`.

    Raises:
      ConfigError: the model's state is no matrix for each head.
    """
    if not config.spec.has_matrix_state:
        raise ConfigError(f"tuning.state = True: {NO_MATRICES.format(config.spec.a_title)}")
    shift, _, matrix = config.spec.state(config)
    of_layer = {MATRIX: matrix.shape} | (dict.fromkeys(SHIFTS, shift.shape) if shifts else {})

    def part(*leading: int) -> Any:
        return {name: jax.ShapeDtypeStruct((*leading, *shape), matrix.dtype) for name, shape in of_layer.items()}

    return {"first_block": part(), "blocks": part(config.num_layers - 1)}


def begin_texts(initial: Any, model: LanguageModel, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
    """The model's state of rows that all begin in the tuned state.

    Args:
      initial: parameters of `state_shapes`; on a mesh the shard's heads.
      axes: as in `LanguageModel.hidden`.
    """
    state = model.initial_state(batch_size, axes)
    if not model.is_stacked:
        layers = [initial["first_block"]]
        layers += [jax.tree.map(lambda x, i=i: x[i], initial["blocks"]) for i in range(model.config.num_layers - 1)]
        return tuple(_with(part, own, 0) for part, own in zip(state, layers, strict=True))
    layers = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), initial["first_block"], initial["blocks"]
    )
    return _with(state, layers, 1)


def _with(state: Any, arrays: Any, rows_axis: int) -> Any:
    """A state whose rows all hold the given arrays, which have no axis of rows."""
    return dataclasses.replace(
        state,
        **{
            name: jnp.broadcast_to(jnp.expand_dims(x, rows_axis), like.shape).astype(like.dtype)
            for name, x in arrays.items()
            for like in (getattr(state, name),)
        },
    )
