"""Requests and answers of /v1/states."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rwkv_jax.serving.protocol.base import Answer, RequestBody
from rwkv_jax.serving.protocol.chat import GivenMessage
from rwkv_jax.serving.protocol.state_fields import Id


class StateBody(RequestBody):
    """A request for a new state: of a text, of a conversation or of a file, or of several of these in this order."""

    id: Id | None = None
    """Its id; by default a random one. A state of that id is replaced."""
    model: str | None = None
    """The model, or an adapter of it, that reads and whose state it is; None is the model."""
    state: str | None = None
    """Continue from this state: an id, or base64 of a state file or of an official file of a tuned state (.pth or
    safetensors)."""
    prompt: str | Annotated[list[int], Field(min_length=1)] | None = None
    """Text or token ids to read. A text that begins starts with the end-of-text token."""
    messages: Annotated[list[GivenMessage], Field(min_length=1)] | None = None
    """Messages to read, in the model's chat format, after which more of any kind may follow."""


class StateObject(Answer):
    """A state that is kept."""

    id: str
    object: Literal["state"] = "state"
    kind: Literal["state", "session"]
    """A session is a conversation's state, which advances with each turn."""
    model: str
    """Digest of the model's parameters."""
    num_tokens: int
    """Tokens that it has read since its text began."""
    num_bytes: int
    """Of its file."""
    created: int
    """Unix time."""


class States(Answer):
    """All states of a tenant, the most recently used first."""

    object: Literal["list"] = "list"
    data: list[StateObject]


class DeletedState(Answer):
    """A state that is gone."""

    id: str
    object: Literal["state"] = "state"
    deleted: Literal[True] = True
