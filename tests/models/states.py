"""States of our models <-> states in tests/golden, whose README.md says what each name means."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.state import State


def to_golden(config: ModelConfig, state: State, layer: int, row: int = 0) -> dict[str, NDArray]:
    """One layer's state of one row under its golden names, in the golden layout."""
    shifts = {"att_x": np.asarray(state.att_shift)[layer, row], "ffn_x": np.asarray(state.ffn_shift)[layer, row]}
    if config.generation == "4":
        return shifts | {name: np.asarray(x)[layer, row] for name, x in zip(("aa", "bb", "pp"), state.wkv, strict=True)}
    wkv = np.asarray(state.wkv)[layer, row]
    # Keys come first there in RWKV-5 and 6, and last, as with us, in RWKV-7.
    return shifts | {"S": wkv if config.generation == "7" else wkv.swapaxes(-1, -2)}


def from_golden(config: ModelConfig, numbers: Mapping[str, NDArray], prefix: str) -> State:
    """A state of one row, from keys such as PREFIX.L0.att_x."""

    def stacked(name: str) -> Array:
        layers = [numbers[f"{prefix}.L{layer}.{name}"] for layer in range(config.num_layers)]
        return jnp.asarray(np.stack(layers)[:, None], config.parameter_dtype)

    if config.generation == "4":
        wkv = tuple(stacked(name) for name in ("aa", "bb", "pp"))
    else:
        wkv = stacked("S") if config.generation == "7" else stacked("S").swapaxes(-1, -2)
    return State(stacked("att_x"), stacked("ffn_x"), wkv, generation=config.generation)
