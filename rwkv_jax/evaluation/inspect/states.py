"""How full a state is: norms and ranks of its matrices, by head over a text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.checks import ConfigError, require
from rwkv_jax.evaluation.inspect.layers import as_tokens
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.state import State


class StateHistory(NamedTuple):
    """State matrices along a text; RWKV-4 has one head, a vector, whose ranks are 1."""

    positions: NDArray
    """int [P]: tokens read so far."""
    norm: NDArray
    """[P, L, B, H]: Frobenius norm |S|."""
    effective_rank: NDArray
    """[P, L, B, H]: e^entropy of the singular values as shares of their sum (Roy and Vetterli, 2007), from 1 to N; 0
    for an empty state."""
    stable_rank: NDArray
    """[P, L, B, H]: |S|^2 / s^2 with the largest singular value s; 0 for an empty state."""


def is_split(state: Any) -> bool:
    """Whether a model's state is one of separate layers, as `decoding.unstacked` has it."""
    return isinstance(state, tuple) and not hasattr(state, "_fields")


def recurrent_part(state: Any, owner: str) -> Any:
    """The recurrence's part of a state of stacked layers, or of one: matrices, or RWKV-4's three arrays.

    Raises:
      ConfigError: it has none.
    """
    if isinstance(state, State):
        return state.wkv
    if (memory := getattr(state, "memory", None)) is None:
        raise ConfigError(f"state: {owner} keeps no matrix (it has {type(state).__name__}); take an RWKV")
    return memory  # of the mixers that RWKV is compared with


def state_matrices(model: LanguageModel, state: Any) -> NDArray:
    """The recurrence's part of a model's state, [L, B, H, M, N] in float64, values before keys.

    Of RWKV-4 it is the weighted mean of the values, numerator / denominator, [L, B, 1, 1, C].

    Raises:
      ConfigError: a state that has no such matrices.
    """
    blocks = state if is_split(state) else (state,)
    parts = [jax.device_get(recurrent_part(block, model.config.title)) for block in blocks]
    wkv = jax.tree.map(lambda *arrays: np.stack(arrays), *parts) if blocks is state else parts[0]
    if isinstance(wkv, tuple):
        numerator, denominator, _ = (np.asarray(x, np.float64) for x in wkv)
        mean = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
        return mean[:, :, None, None, :]
    return np.asarray(wkv, np.float64)


def matrix_ranks(matrices: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Norms, effective ranks and stable ranks of matrices [..., M, N]; see `StateHistory`."""
    singular = np.linalg.svd(matrices, compute_uv=False)
    norm = np.sqrt(np.sum(singular**2, axis=-1))
    is_empty = norm == 0
    shares = singular / np.where(is_empty, 1, singular.sum(axis=-1))[..., None]
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    largest = np.where(is_empty, 1, singular[..., 0])
    return norm, np.where(is_empty, 0, np.exp(entropy)), norm**2 / largest**2


@functools.cache
def _reader(graphdef: Any) -> Callable[..., Any]:
    """(params, tokens, state) -> the next state."""
    return jax.jit(lambda params, tokens, state: nnx.merge(graphdef, params).hidden(tokens, state).state)


def read_texts(model: LanguageModel, tokens: ArrayLike, state: Any = None) -> Any:
    """The model's state after texts [B, T]; None is the state before any."""
    ids = as_tokens(model, tokens)
    graphdef, params = nnx.split(model, nnx.Param)
    state = model.initial_state(len(ids)) if state is None else state
    return _reader(graphdef)(params, jnp.asarray(ids), state)


def state_history(model: LanguageModel, tokens: ArrayLike, every: int = 1) -> StateHistory:
    """Norms and ranks of every head's state, after each `every` tokens and after the last.

    Args:
      tokens: [B, T], or [T] for one text.

    Raises:
      ConfigError: as `as_tokens` and `state_matrices`; every below 1.
    """
    require(every >= 1, "every", every, "must be at least 1")
    ids, state = as_tokens(model, tokens), None
    time = ids.shape[1]
    measured = []
    positions = [*range(every, time, every), time]
    for begin, end in zip([0, *positions], positions, strict=False):
        state = read_texts(model, ids[:, begin:end], state)
        measured.append(matrix_ranks(state_matrices(model, state)))
    norm, effective, stable = (np.stack(x) for x in zip(*measured, strict=True))
    return StateHistory(np.asarray(positions), norm, effective, stable)
