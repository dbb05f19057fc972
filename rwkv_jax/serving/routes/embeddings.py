"""/v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64
import functools
from typing import Any, NamedTuple

import anyio.to_thread
import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.embeddings import Embedding, EmbeddingBody, Embeddings, EmbeddingUsage
from rwkv_jax.serving.service import Service, ServiceOf
from rwkv_jax.serving.texts import check_lengths
from rwkv_jax.serving.token_counts import count_tokens

router = APIRouter(tags=["embeddings"])


class Reading(NamedTuple):
    """What is read of texts to embed them."""

    ids: list[list[int]]
    skip: int
    """First tokens of each that do not count in the mean."""


@router.post("/v1/embeddings")
async def embed(body: EmbeddingBody, service: ServiceOf) -> Embeddings:
    """Embeds one text or several."""
    if (adapter := service.check_model(body.model)) is not None:
        message = f"model = {body.model!r}: embeddings are the model's own; ask {service.model_name!r} for them"
        raise APIError(400, f"{message}, without the adapter {adapter!r}", param="model")
    # One request at a time is read; those that wait keep no thread from other work.
    return await anyio.to_thread.run_sync(_answer, body, service, limiter=service.embedding_turns)


def as_reading(body: EmbeddingBody, engine: Engine) -> Reading:
    """The tokens to read. Raises ConfigError for a text that is empty or not UTF-8.

    A text starts with the end-of-text token, which does not count, and for `last` ends with one: what the model knows
    when the text is over. Ids are used as they are.
    """
    given: Any = body.input
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if not isinstance(texts[0], str):
        return Reading(texts, 0)
    end = [engine.tokenizer.end_of_text] if body.pooling == "last" else []
    return Reading([[*engine.encode(text, begins=True), *end] for text in texts], 1)


def encoded(vector: NDArray[Any], encoding: str | None) -> list[float] | str:
    """A vector as an answer has it."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(np.float64).tolist()


def _answer(body: EmbeddingBody, service: Service) -> Embeddings:
    try:
        reading = as_reading(body, service.engine)
        check_lengths(service, reading.ids)
        vectors = service.engine.embed(reading.ids, body.pooling, skip=reading.skip)
    except ConfigError as error:
        raise APIError(400, str(error), param="input") from error
    encode = functools.partial(encoded, encoding=body.encoding_format)
    read = sum(map(len, reading.ids))
    count_tokens("prompt_tokens", read)
    return Embeddings(
        data=[Embedding(index=index, embedding=encode(vector)) for index, vector in enumerate(vectors)],
        model=service.model_name,
        usage=EmbeddingUsage(prompt_tokens=read, total_tokens=read),
    )
