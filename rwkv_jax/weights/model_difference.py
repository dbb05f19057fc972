"""In which fields the model of weights differs from that of a run, and the flags with which it would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.model import IMPLEMENTATIONS


def ignored_fields(model: ModelConfig) -> set[str]:
    """Fields of a config that what its weights compute does not follow from, but for rounding."""
    free = {*IMPLEMENTATIONS, "dtype", "embedding_bound", "context_length", "rosa_window", "rosa_implementation"}
    return free if model.spec.has_heads else free | {"head_dim"}


def model_difference(found: ModelConfig, wanted: ModelConfig, ignored: Collection[str] = ()) -> str | None:
    """The fields in which a model differs from that of weights, and the flags with which it would not; None for none.

    Args:
      found: the model of the weights.
      ignored: further fields that may differ. (Implementations, dtype, first values and room may.)
    """
    free = ignored_fields(wanted) | set(ignored)
    there, here = (dataclasses.asdict(each.resolved()) for each in (found, wanted))
    # A default that another architecture does not have goes with the other one.
    differences = [
        name
        for name, value in there.items()
        if name not in free and value != here[name] and value != getattr(wanted, name)
    ]
    if not differences:
        return None
    # What weights lack altogether follows from another difference, if there is one: a size of other layers.
    differences = [name for name in differences if there[name] is not None] or differences
    listed = ", ".join(f"model.{x} = {_shown(here[x])} here and {_shown(there[x])} there" for x in differences)
    return f"{listed}; to start from them: {' '.join(_flag(name, there[name]) for name in differences)}"


def _flag(name: str, value: Any) -> str:
    """The flag of `rwkv train` that sets a field of the model."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{name}" if value else f"--model.no-{name}"
    return f"--model.{name} {_shown(value)}".rstrip()


def _shown(value: Any) -> Any:
    """A field's value as flags have it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
