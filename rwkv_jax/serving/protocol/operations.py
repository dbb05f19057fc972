"""Bodies of /health; of /tokenize, /detokenize, /tokenizer_info, which are vLLM's; of /apply-template, llama.cpp's."""

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


class TokenizerInfo(Answer):
    """What clients that tokenize by the server ask first, such as lm-eval's `tokenizer_backend=remote`."""

    tokenizer_class: str
    vocab_size: int
    bos_token: None = None
    """The end-of-text token, which begins a text, has no text."""
    eos_token: None = None
    """As above."""
    eos_token_id: int


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
