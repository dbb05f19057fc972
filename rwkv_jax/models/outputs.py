"""What calls of a model return."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array


class HiddenOutput(NamedTuple):
    """Output of the blocks."""

    hidden: Array
    """[B, T, C] after the last norm; of `residual_stream`, [L, B, T, C]."""
    state: Any
    """The next state."""


class ModelOutput(NamedTuple):
    """Output of a model."""

    logits: Array
    """[B, T, V] of the next token, in at least float32."""
    state: Any
    """The next state."""
