"""Messages of a conversation, as a client's list of them or as `Message`, checked one by one.

The names of fields are those of OpenAI's chat API. An error names the message by its place, `messages[2]`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_jax.config import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may have written a message; a developer's is taken for the system's."""

_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: str
    """JSON text of an object, as the model wrote it."""
    id: str = ""
    """By which a tool's message names the call that it answers; empty if nothing does."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message."""

    role: str
    """One of `ROLES`."""
    content: str = ""
    reasoning: str = ""
    """What the assistant thought before its content."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that end an assistant's message."""
    tool_call_id: str = ""
    """The call that a tool's message answers; empty for the last ones."""
    name: str = ""
    """Of the tool or the speaker; formats without names leave it out."""


def clean(text: str) -> str:
    """A text without blank lines, which separate turns, and without surrounding space."""
    return re.sub("\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def read_messages(messages: Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages from a client's list, of which each is checked by itself and a tool's with the calls before it.

    Args:
      messages: each a `Message`, or a mapping with OpenAI's fields: `role`, `content` (a string, or parts of type
        `text`, which are joined), `reasoning_content`, `tool_calls`, `tool_call_id`, `name`.

    Raises:
      ConfigError: no message, an unknown role or field, no content, content other than text, or a tool's message
        without a call; the error names the message and the remedy.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("messages: must be a list with at least one message")
    read = tuple(_read(f"messages[{index}]", message) for index, message in enumerate(messages))
    for index, message in enumerate(read):
        _check(f"messages[{index}]", message, read[:index])
    return read


def _read(place: str, message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Mapping):
        message = _from_mapping(place, message)
    if not isinstance(message, Message):
        raise ConfigError(f"{place}: must be an object with role and content, not {type(message).__name__}")
    if message.role not in ROLES:
        raise ConfigError(f"{place}: role = {message.role!r}: must be one of {', '.join(ROLES)}")
    return dataclasses.replace(message, role="system") if message.role == "developer" else message


def _from_mapping(place: str, fields: Mapping[str, Any]) -> Message:
    unknown = [str(name) for name in fields if name not in _FIELDS]
    if unknown:
        raise ConfigError(f"{place}: has no field {', '.join(unknown)}; it may have {', '.join(_FIELDS)}")
    texts = {name: fields.get(name) for name in ("role", "reasoning_content", "tool_call_id", "name")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{place}: {name} must be a string, not {type(text).__name__}")
    calls = fields.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ConfigError(f"{place}: tool_calls must be a list")
    return Message(
        role=texts["role"] or "",
        content=_joined(place, fields.get("content")),
        reasoning=texts["reasoning_content"] or "",
        tool_calls=tuple(_call(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(calls)),
        tool_call_id=texts["tool_call_id"] or "",
        name=texts["name"] or "",
    )


def _joined(place: str, content: Any) -> str:
    """Content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ConfigError(f"{place}: content must be a string or a list of parts, not {type(content).__name__}")
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(f'{place}.content[{index}]: must be {{"type": "text", "text": "..."}}; models read text')
    return "".join(part["text"] for part in content)


def _call(place: str, call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ConfigError(f'{place}: must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
    name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id") or ""
    if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call_id, str):
        raise ConfigError(f"{place}: name, arguments and id must be strings; arguments is JSON text")
    return ToolCall(name, arguments, call_id)


def _check(place: str, message: Message, before: Sequence[Message]) -> None:
    """Checks a message by itself, and a tool's with those before it."""
    try:
        f"{message.content}{message.reasoning}{message.name}".encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: has half of a surrogate pair ({error.reason}); send whole characters") from error
    if message.tool_calls and message.role != "assistant":
        raise ConfigError(f"{place}: only the assistant has tool_calls, not the {message.role}")
    if message.reasoning and message.role != "assistant":
        raise ConfigError(f"{place}: only the assistant has reasoning, not the {message.role}")
    for index, call in enumerate(message.tool_calls):
        _check_call(f"{place}.tool_calls[{index}]", call)
    if message.role == "tool":
        answered = next((other for other in reversed(before) if other.role != "tool"), None)
        calls = () if answered is None else answered.tool_calls
        if not calls:
            raise ConfigError(f"{place}: a tool's message answers a call; put the assistant's tool_calls before it")
        ids = [call.id for call in calls]
        if message.tool_call_id and message.tool_call_id not in ids:
            raise ConfigError(f"{place}: tool_call_id = {message.tool_call_id!r}: the calls before it are {ids}")
    elif not message.content.strip() and not message.tool_calls and not message.reasoning.strip():
        raise ConfigError(f"{place}: content is empty; give it some text, or leave the message out")


def _check_call(place: str, call: ToolCall) -> None:
    if not call.name.strip():
        raise ConfigError(f"{place}: name is empty; name the function")
    try:
        is_object = isinstance(json.loads(call.arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ConfigError(f"{place}: arguments must be the JSON text of an object, such as '{{}}'")
