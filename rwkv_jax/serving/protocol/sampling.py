"""Fields of all requests that generate text, under OpenAI's, vLLM's and RWKV's names, as the engine's arguments."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.requests import MAX_SEED
from rwkv_jax.inference.sampling.params import Order, SamplingParams
from rwkv_jax.serving.protocol.base import RequestBody

MAX_TEXTS = 128
"""Texts of one prompt, as OpenAI limits them."""

MAX_STOPS = 64
"""Strings that end a text; OpenAI allows 4. Each is looked for at every token."""

_SETTINGS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
_SETTINGS += ("frequency_penalty", "penalty_decay", "penalize_prompt", "order")
_MAX_SEED_GIVEN = 2**63


class StreamOptions(RequestBody):
    """What a stream has besides the text."""

    include_usage: bool = False
    """Whether a last chunk without choices has the usage."""


class GenerationBody(RequestBody):
    """What requests for texts have in common."""

    model: str
    """Name of the model, as /v1/models has it."""
    temperature: float | None = None
    """Divides the logits; 0 always takes the most likely token. 1 by default."""
    top_p: float | None = None
    """Keep the most likely tokens whose probabilities add up to this. 1, all, by default."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Keep this many of the most likely tokens; 0, the default, and -1 keep all."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the most likely one."""
    typical_p: float | None = None
    """Keep the most typical tokens whose probabilities add up to this."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that have occurred."""
    frequency_penalty: float | None = None
    """Subtracted from the logit of a token for each of its occurrences."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens that have occurred, multiplies negative ones."""
    penalty_decay: float | None = None
    """Factor on the weight of earlier occurrences at each token; 1, the default, is no decay."""
    penalize_prompt: bool | None = None
    """Whether tokens of the prompt count as occurrences."""
    order: Order | None = None
    """Whether temperature comes first, as in OpenAI's API, or last, as in the package rwkv."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of these token ids."""
    seed: Annotated[int, Field(ge=-_MAX_SEED_GIVEN, lt=_MAX_SEED_GIVEN)] | None = None
    """The same seed gives the same text; of greater numbers the lowest 32 bits count. Random by default."""
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
    """Texts to return for each prompt. 1 by default."""
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    """Strings that end a text; not part of it."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a text besides the end-of-text token; not part of it."""
    ignore_eos: bool = False
    """Whether the end-of-text token does not end a text."""
    guided_json: dict[str, Any] | str | None = None
    """JSON schema that the text must match, an object or its JSON."""
    guided_regex: str | None = None
    """Regular expression that the whole text must match."""
    guided_grammar: str | None = None
    """Context-free grammar that the text must match, in llguidance's form of Lark."""
    stream: bool | None = None
    """Whether the text is sent in chunks, as server-sent events."""
    stream_options: StreamOptions | None = None
    """With `stream` only."""
    user: str | None = None
    """The end user. Accepted, and not used."""

    def sampling(self) -> SamplingParams:
        """The sampling parameters. Raises ConfigError for an invalid value."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        top_k = max(0, self.top_k or 0)
        return SamplingParams(**given, top_k=top_k, logit_bias=_biases(self.logit_bias or {}))

    def seeds(self, count: int) -> list[int]:
        """A seed for each of `count` texts: the seed given and the numbers after it."""
        first = secrets.randbits(32) if self.seed is None else self.seed
        return [(first + i) & MAX_SEED for i in range(count)]

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def stop_ids(self, ends: Collection[int]) -> set[int]:
        """The ids that end a text."""
        return {*(self.stop_token_ids or ()), *(() if self.ignore_eos else ends)}

    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with its usage. Raises ConfigError for options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise ConfigError("stream_options: are those of a stream; set stream, or leave them out")
        return self.stream_options is not None and self.stream_options.include_usage


def _biases(biases: dict[str, float]) -> dict[int, float]:
    for token in biases:
        if not (token.isascii() and token.isdigit()):
            raise ConfigError(f"logit_bias: names token id {token!r}; ids are whole numbers from 0")
    return {int(token): bias for token, bias in biases.items()}


NotStored = Literal[False] | None
"""Of `store`: nothing is kept for OpenAI's dashboard."""
