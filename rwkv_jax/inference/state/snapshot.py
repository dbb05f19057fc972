"""Snapshot of one text's state between calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array

from rwkv_jax.config import ConfigError


class StateError(ConfigError):
    """The state belongs to another model, generation or tokenizer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """One text's state; immutable, so that texts with a common prefix can share it."""

    state: Any
    """The model's state without a row axis: a tuple of one `State` (`KeyValueCache`) per layer."""
    logits: Array
    """[V], of the next token, float32, or float64 in a float64 model."""
    num_tokens: int
    """Tokens since the text began."""
    owner: str | None = None
    """Checksum of the model's parameters; None if unknown."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.state, self.logits)))
