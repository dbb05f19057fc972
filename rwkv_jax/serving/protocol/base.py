"""What the bodies of all requests and answers have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestBody(BaseModel):
    """A request or a part of one. Unknown fields are errors: none is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """An answer or a part of one."""


class PromptTokensDetails(Answer):
    """What is known of a prompt's tokens."""

    cached_tokens: int
    """Tokens whose state was in the prefix cache."""


class Usage(Answer):
    """Tokens that a request has cost."""

    prompt_tokens: int
    """Tokens that were read, each prompt once, with the end-of-text token that begins a text."""
    completion_tokens: int
    """Tokens that were generated, also those that are not shown."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: PromptTokensDetails
