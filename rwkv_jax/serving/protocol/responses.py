"""Requests and answers of /v1/responses, in its text subset: messages in, reasoning and a message out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.protocol.base import Answer, RequestBody
from rwkv_jax.serving.protocol.chat import ChatBody, Effort
from rwkv_jax.serving.protocol.formats import JSONObjectFormat, TextFormat
from rwkv_jax.serving.protocol.state_fields import Id

Status = Literal["in_progress", "completed", "incomplete"]
"""Of a response or an item of it."""


class InputText(RequestBody):
    """A part of a message; of the model's own ones as an answer has them."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(RequestBody):
    """A message of the conversation so far; the model's own ones as an answer has them."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: Status | None = None


class SchemaFormat(RequestBody):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextOptions(RequestBody):
    """The form of the text."""

    format: Annotated[TextFormat | JSONObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(RequestBody):
    """How long the model thinks."""

    effort: Effort | None = None


class ResponseBody(RequestBody):
    """A request for a response."""

    model: str
    """Name of the model, as /v1/models has it."""
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    """A message of the user, or a conversation."""
    instructions: str | None = None
    """The system's message, before all others."""
    max_output_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens to generate at most, with those of thinking; 2048 by default."""
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    """Whether events are sent as the text is generated."""
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    """Returned as it is."""
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    """Whether the state after the response is kept under the response's id; it is not by default."""
    previous_response_id: Id | None = None
    """Continue after a response that was stored. Give the new messages only: its state has read the others."""
    user: str | None = None
    """The end user. Accepted, and not used."""

    def as_chat(self) -> ChatBody:
        """The same request of the chat API. Raises ConfigError for fields that do not go together."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None and self.previous_response_id is not None:
            raise ConfigError(
                "instructions: those that the previous response has read hold on; leave either of them out"
            )
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [{"role": each.role, "content": _text(each.content)} for each in self.input]
        return ChatBody.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stream": self.stream,
                "response_format": self._response_format(),
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
                "state": self.previous_response_id,
                "return_state": "id" if self.store else "none",
            }
        )

    def _response_format(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if not isinstance(form, SchemaFormat):
            return None if form is None else {"type": form.type}
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class OutputText(Answer):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class OutputMessage(Answer):
    """The model's message."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningText(Answer):
    """What was thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(Answer):
    """What the model thought before its message."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningText]


class CachedTokens(Answer):
    """Tokens whose state was in the prefix cache."""

    cached_tokens: int


class ReasoningTokens(Answer):
    """Tokens of thinking, which are not told apart from others."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    """Tokens that a response has cost."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(Answer):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(Answer):
    """A response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time."""
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    model: str
    output: list[ReasoningItem | OutputMessage]
    parallel_tool_calls: Literal[True] = True
    previous_response_id: str | None
    store: bool
    temperature: float | None
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = Field(default_factory=list)
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
