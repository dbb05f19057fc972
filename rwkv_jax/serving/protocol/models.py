"""Answers of /v1/models."""

from __future__ import annotations

from typing import Literal

from rwkv_jax.serving.protocol.base import Answer


class Model(Answer):
    """A model that requests can ask for."""

    id: str
    """Its name."""
    object: Literal["model"] = "model"
    created: int
    """Unix time."""
    owned_by: str = "rwkv-jax"
    parent: str | None = None
    """Of an adapter, the model that it adapts."""


class Models(Answer):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]
