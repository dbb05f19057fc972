"""Preferences in records, checked one by one.

| fields | |
|---|---|
| `prompt`, `chosen`, `rejected` | texts, or lists of messages; `chosen` and `rejected` are replies to the prompt |
| `chosen`, `rejected` | two lists of messages that are whole conversations, which differ in the last one only |
| `prompt`, `completion`, `label` | a reply, text or messages, that is desirable (true) or not, for KTO |

Texts are read as they are: what follows `prompt` is the reply. Messages are written by `data.chat_format`, and a prompt
given as a text beside them is the user's last message. Other fields, such as scores, are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_jax.chat.messages import Message, read_messages
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt and its replies, as texts."""

    prompt: str
    first: str
    """The chosen reply, or the only one."""
    second: str | None = None
    """The rejected reply; None for a single one."""
    label: bool | None = None
    """Whether a single reply is desirable."""


def read_pair(record: Mapping[str, Any], template: ChatTemplate) -> Preference:
    """The prompt and both replies of a record.

    Raises:
      ConfigError: a field is missing, of another type or empty, or the prompts of both replies differ; the message
        begins with the field.
    """
    sides = {name: _field(record, name) for name in ("chosen", "rejected")}
    prompt = record.get("prompt")
    written = {name: _written(prompt, value, name, template) for name, value in sides.items()}
    (first_prompt, first), (second_prompt, second) = written["chosen"], written["rejected"]
    if first_prompt != second_prompt:
        raise ConfigError(
            f"chosen, rejected: their prompts differ, {_around(first_prompt, second_prompt)}; both must be replies to "
            "one prompt"
        )
    if first == second:
        raise ConfigError("chosen, rejected: are the same reply; remove the record")
    return Preference(first_prompt, first, second)


def read_labeled(record: Mapping[str, Any], template: ChatTemplate) -> Preference:
    """The prompt, reply and label of a record. Raises as `read_pair`."""
    _field(record, "prompt")
    prompt, reply = _written(record["prompt"], _field(record, "completion"), "completion", template)
    label = _field(record, "label")
    if not isinstance(label, bool):
        raise ConfigError(f"label = {label!r}: must be true (desirable) or false")
    return Preference(prompt, reply, label=label)


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise ConfigError(f"{name}: is missing; the record has {', '.join(sorted(record)) or 'no fields'}")
    return record[name]


def _written(prompt: Any, value: Any, field: str, template: ChatTemplate) -> tuple[str, str]:
    """The text of a prompt and of the reply in a field."""
    if isinstance(value, str):
        if not isinstance(prompt, str):
            raise ConfigError(
                f"prompt: must be a text, as {field} is, not {type(prompt).__name__}"
                if prompt is not None
                else f"prompt: is missing, and {field} is a text"
            )
        if not value:
            raise ConfigError(f"{field}: the reply is empty; remove the record")
        for name, text in (("prompt", prompt), (field, value)):
            _check_unicode(name, text)
        return prompt, value
    messages = _conversation(prompt, _messages(field, value), field)
    last = messages[-1]
    if last.role != "assistant":
        raise ConfigError(f"{field}: ends with a message of the {last.role}; its last one must be the reply")
    asked = template.render(messages[:-1], thinking="none")
    whole = template.render(messages, thinking="none", add_generation_prompt=False)
    if not whole.startswith(asked):
        raise ConfigError(
            f"{field}: the chat format writes the prompt otherwise when a reply follows, so the model would not be "
            "asked as it is trained; take another data.chat_format, or texts"
        )
    reply = whole[len(asked) :]
    if not reply.strip():
        raise ConfigError(f"{field}: the reply is empty; remove the record")
    return asked, reply


def _conversation(prompt: Any, reply: list[Message], field: str) -> list[Message]:
    """A whole conversation of a prompt, a text, messages or none, and the messages of a reply's field."""
    if prompt is None:
        return reply
    if isinstance(prompt, str):
        if len(reply) == 1:
            return [Message("user", prompt), *reply]
        asked = [message for message in reply[:-1] if message.role == "user"]
        if not asked or prompt not in (asked[0].content, asked[-1].content):
            raise ConfigError(f"{field}: is a conversation about something else than prompt; their prompts differ")
        return reply
    return [*_messages("prompt", prompt), *reply]


def _messages(field: str, value: Any) -> list[Message]:
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{field}: must be a text or a list of messages, not {type(value).__name__}")
    try:
        return list(read_messages(value))
    except ConfigError as error:
        raise ConfigError(str(error).replace("messages[", f"{field}[", 1)) from error


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{field}: has half a surrogate pair at character {error.start}") from error


def _around(one: str, other: str) -> str:
    """Where two texts part, for a message."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - 10)
    return f"{one[start : at + 20]!r} and {other[start : at + 20]!r} at character {at}"
