"""Requests and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rwkv_jax.chat.template import Thinking
from rwkv_jax.inference.engine.requests import MAX_TOP_LOGPROBS
from rwkv_jax.serving.protocol.base import Answer, RequestBody
from rwkv_jax.serving.protocol.formats import ResponseFormat
from rwkv_jax.serving.protocol.sampling import GenerationBody, NotStored
from rwkv_jax.serving.protocol.state_fields import StateFields, TextAnswer

Effort = Literal["none", "minimal", "low", "medium", "high"]
"""How long a model shall think."""

FinishReason = Literal["stop", "length", "tool_calls"]
"""Why a reply has ended."""


class TextPart(RequestBody):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(RequestBody):
    """A function and what it is called with."""

    name: str
    arguments: str
    """JSON text of an object."""


class GivenCall(RequestBody):
    """A call in an earlier message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class GivenMessage(RequestBody):
    """A message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    """What the assistant thought before its content."""
    tool_calls: list[GivenCall] | None = None
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    name: str | None = None
    refusal: None = None
    """As an answer's message has it, so that it can be sent back."""


class Function(RequestBody):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: Literal[False] | None = None


class Tool(RequestBody):
    """A tool; there are functions only."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestBody):
    """Names a function."""

    name: str


class NamedTool(RequestBody):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TemplateVariables(RequestBody):
    """What a chat template is told besides messages and tools."""

    enable_thinking: bool | None = None
    """Whether the model thinks first, as long as it chooses."""
    thinking: Thinking | None = None
    """The way of thinking, as `rwkv chat --thinking`."""


class ChatBody(GenerationBody, StateFields):
    """A request for the next message of a conversation."""

    messages: Annotated[list[GivenMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """The older name of max_completion_tokens."""
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens to generate at most, with those of thinking; 2048 by default."""
    logprobs: bool | None = None
    """Whether to report the logprob of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """With `logprobs`, the number of most likely tokens to report at each position."""
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Whether the model may call a tool, or must, or must call this one; `auto` by default."""
    parallel_tool_calls: Literal[True] | None = None
    """A reply may have several calls."""
    response_format: ResponseFormat | None = None
    """Form of the answer, which is JSON or any text."""
    reasoning_effort: Effort | None = None
    """Length of thinking of models that think; the template's own by default."""
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool = True
    """Whether a reply is begun behind the last message."""
    continue_final_message: bool = False
    """Whether the reply goes on with the last message, the assistant's."""
    store: NotStored = None


class TokenLogprob(Answer):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]
    """Of its text in UTF-8, of which a token may be a part."""


class ContentLogprob(TokenLogprob):
    """A token of the reply."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """Logprobs of a reply's tokens, thinking and markers among them."""

    content: list[ContentLogprob]
    refusal: None = None


class CallAnswer(Answer):
    """What a tool is called with."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call in a reply."""

    index: Annotated[int | None, Field(exclude_if=lambda index: index is None)] = None
    """In streams, which of the calls it is."""
    id: str
    type: Literal["function"] = "function"
    function: CallAnswer


def _is_none(value: object) -> bool:
    return value is None


Reasoning = Annotated[str | None, Field(exclude_if=_is_none)]
Calls = Annotated[list[ToolCallAnswer] | None, Field(exclude_if=_is_none)]


class Message(Answer):
    """A reply."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: Reasoning = None
    """What the model thought first."""
    tool_calls: Calls = None
    refusal: None = None


class Choice(Answer):
    """One reply."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(TextAnswer):
    """Replies to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]


class Delta(Answer):
    """What a chunk adds to a reply."""

    role: Annotated[Literal["assistant"] | None, Field(exclude_if=_is_none)] = None
    content: Annotated[str | None, Field(exclude_if=_is_none)] = None
    reasoning_content: Reasoning = None
    tool_calls: Calls = None


class ChunkChoice(Answer):
    """A piece of one reply."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(TextAnswer):
    """A chunk of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
