"""Requests and answers of /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rwkv_jax.inference.embedder import Pooling
from rwkv_jax.serving.protocol.base import Answer, RequestBody
from rwkv_jax.serving.protocol.completions import Ids

_MAX_TEXTS = 2048  # as OpenAI's

Texts = Annotated[list[str] | list[Ids], Field(min_length=1, max_length=_MAX_TEXTS)]


class EmbeddingBody(RequestBody):
    """A request for vectors of texts."""

    model: str
    """Name of the model, as /v1/models has it."""
    input: Annotated[str, Field(min_length=1)] | Ids | Texts
    """A text, token ids, or several of one of them."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, the default, or the bytes of little-endian float32 in base64."""
    pooling: Pooling = "mean"
    """Mean of the hidden states after each token, or the one after the end of the text."""
    user: str | None = None
    """The end user. Accepted, and not used."""


class Embedding(Answer):
    """The vector of a text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """Vectors of all texts of a request."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
