"""Requests and answers of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rwkv_jax.inference.engine.requests import MAX_TOP_LOGPROBS, FinishReason
from rwkv_jax.serving.protocol.base import Answer
from rwkv_jax.serving.protocol.sampling import MAX_TEXTS, GenerationBody
from rwkv_jax.serving.protocol.state_fields import StateFields, TextAnswer

Ids = Annotated[list[int], Field(min_length=1)]


class CompletionBody(GenerationBody, StateFields):
    """A request for continuations."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1)]
    """A text, token ids, or several of one of them. A text starts with the end-of-text token, ids are used as they are;
    "" begins a text."""
    suffix: str | None = None
    """Text behind what is generated, for models trained to fill in the middle."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens to generate at most; 16 by default. 0 only reads the prompt."""
    best_of: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
    """Texts to generate for each prompt, of which the `n` with the greatest mean logprob are returned."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Number of most likely tokens to report at each position besides the chosen one."""
    echo: bool | None = None
    """Whether the text starts with the prompt; with `logprobs`, its tokens are scored, too."""

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]

    def num_texts(self) -> int:
        """Texts that are generated."""
        return len(self.prompts()) * (self.best_of or self.n or 1)


class Logprobs(Answer):
    """Log-probabilities of a text's tokens, by the model alone."""

    tokens: list[str]
    """Texts of the tokens; `bytes:\\\\xe2\\\\x80` for a part of a character."""
    token_logprobs: list[float | None]
    """None for the first token of a prompt, which has nothing before it."""
    top_logprobs: list[dict[str, float] | None]
    """At each position the most likely tokens and the chosen one."""
    text_offset: list[int]
    """Character at which each token starts."""

    def __add__(self, other: Logprobs) -> Logprobs:
        """Of two pieces of a text."""
        return Logprobs(**{name: getattr(self, name) + getattr(other, name) for name in Logprobs.model_fields})


class Choice(Answer):
    """One text, or a piece of it."""

    index: int
    """Prompt p's texts are those from p * n on."""
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    """None while the text goes on."""


class Completion(TextAnswer):
    """Continuations, or a chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]
