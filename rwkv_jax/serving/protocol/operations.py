"""Bodies of /health; of /tokenize and /detokenize, as vLLM has them; of /apply-template, as llama.cpp has it."""

from __future__ import annotations

from typing import Literal

from rwkv_jax.serving.protocol.base import Answer, RequestBody
from rwkv_jax.serving.protocol.chat import ChatBody


class Health(Answer):
    """Whether requests are welcome."""

    status: Literal["ok", "warming up", "shutting down"]


class TokenizeRequest(RequestBody):
    """A text."""

    model: str | None = None
    """Name of the model, if at all."""
    prompt: str
    add_special_tokens: bool = True
    """Whether the end-of-text token that begins a text is put first, as /v1/completions does."""
    return_token_strs: bool = False
    """Whether each token's text is returned, too."""


class Tokens(Answer):
    """Its tokens."""

    count: int
    max_model_len: int | None
    """Tokens that a prompt may have; null is no limit."""
    tokens: list[int]
    token_strs: list[str] | None = None
    """Of each token; U+FFFD for parts of a character."""


class DetokenizeRequest(RequestBody):
    """Token ids."""

    model: str | None = None
    """Name of the model, if at all."""
    tokens: list[int]


class TemplateBody(ChatBody):
    """A conversation, as /v1/chat/completions takes it; what concerns generation is checked and has no effect."""

    model: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class Text(Answer):
    """A text."""

    prompt: str
