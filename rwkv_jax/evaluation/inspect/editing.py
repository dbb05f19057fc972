"""Changes what a model remembers: directions in the space of states, and states moved along them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.inspect.states import is_split, read_texts, recurrent_part, state_matrices
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.state import State


def state_direction(model: LanguageModel, texts_from: ArrayLike, texts_to: ArrayLike) -> NDArray:
    """The mean state after some texts minus the mean state after others.

    Args:
      texts_from, texts_to: token ids [B, T], of any two sizes.

    Returns:
      [L, H, M, N], of RWKV-4 [L, 1, 1, C]; see `state_matrices`.
    """
    means = (state_matrices(model, read_texts(model, texts)).mean(axis=1) for texts in (texts_to, texts_from))
    return next(means) - next(means)


def edit_state(state: Any, direction: NDArray, scale: float = 1.0) -> Any:
    """A state moved by scale times a direction in every row; token shifts stay as they were.

    In RWKV-4 the weighted mean of the values is moved, and keeps its weight.

    Args:
      state: of a model, of any number of texts.
      direction: [L, H, M, N], as of `state_direction`; with zeros, only some layers or heads are moved.

    Raises:
      ConfigError: a state without matrices, or a direction of another model.
    """
    if is_split(state):
        if len(state) != len(direction):
            raise ConfigError(f"direction: has {len(direction)} layers where the state has {len(state)}")
        parts = zip(state, direction, strict=True)
        return tuple(_moved(block, scale * part, direction.shape) for block, part in parts)
    return _moved(state, scale * direction[:, None], direction.shape)


def _moved(state: Any, change: NDArray, shape: tuple[int, ...]) -> Any:
    """A stacked state, or that of one block; `change` broadcasts over the rows."""
    wkv = recurrent_part(state, "this model")
    own = change[..., 0, 0, :] if isinstance(wkv, tuple) else change
    like = wkv[0] if isinstance(wkv, tuple) else wkv
    axes = zip(own.shape[::-1], like.shape[::-1], strict=False)
    if own.ndim > like.ndim or not all(size in (1, held) for size, held in axes):
        raise ConfigError(f"direction: of shape {shape} does not fit states of shape {like.shape}")
    own = jnp.asarray(own, like.dtype)
    moved = (wkv[0] + own * wkv[1], *wkv[1:]) if isinstance(wkv, tuple) else wkv + own
    return dataclasses.replace(state, wkv=moved) if isinstance(state, State) else state._replace(memory=moved)
