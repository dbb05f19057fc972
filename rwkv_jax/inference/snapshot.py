"""The state of one text between two calls: all that a model keeps of its tokens, in a constant size."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array

from rwkv_jax.config import ConfigError


class StateError(ConfigError):
    """A state that belongs to another model, generation or tokenizer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """One text's state; immutable, so that texts with a common prefix can share it."""

    state: Any
    """What the model carries, without an axis of rows: a tuple of one `State` (`KeyValueCache`) a layer."""
    logits: Array
    """[V] of the token that comes next, in float32; in float64 of a float64 model."""
    num_tokens: int
    """Tokens since the text began."""
    owner: str | None = None
    """Checksum of the parameters that made it; None if unknown."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.state, self.logits)))
