"""Conversations in records of the usual forms, checked one by one.

| form | fields |
|---|---|
| `messages` | `messages` in OpenAI's form, also with `reasoning` and `weight` (0: does not count), and `tools` |
| `sharegpt` | `conversations` of `from` and `value`, with `system` and `tools` |
| `alpaca` | `instruction`, `input`, `output`, with `system` and `history`, pairs of earlier turns |
| `completion` | `prompt` and `completion`, two texts or two lists of messages |

Other fields of a record, such as an id, are not read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rwkv_jax.chat.messages import Message, read_messages
from rwkv_jax.config import ConfigError
from rwkv_jax.config.data import ChatForm

_RECOGNIZED: dict[ChatForm, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
}
"""Fields by which each form is recognized."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation that ends with a reply."""

    messages: tuple[Message, ...]
    replies: tuple[int, ...]
    """Messages of the assistant that may count."""
    tools: tuple[Mapping[str, Any], ...] = ()
    left_out: int = 0
    """Messages after the last reply, which nobody answers and which are no part of this."""


def recognize(record: Mapping[str, Any]) -> ChatForm:
    """The form of a record. Raises ConfigError if it has the fields of none, or of several."""
    found: list[ChatForm] = [
        form for form, fields in _RECOGNIZED.items() if all(record.get(field) is not None for field in fields)
    ]
    if len(found) == 1:
        return found[0]
    forms = "; ".join(f"{form}: {', '.join(fields)}" for form, fields in _RECOGNIZED.items())
    what = f"fields {sorted(map(str, record))} are those of no form" if not found else f"it has those of {found}"
    raise ConfigError(f"{what} ({forms}); rename them, or name the form with data.chat")


def read_conversation(record: Mapping[str, Any], form: ChatForm) -> Conversation:
    """The conversation in a record of a form.

    Raises:
      ConfigError: a field that is missing or of another type, an unknown role, an empty message, no reply; the error
        begins with the field.
    """
    missing = [field for field in _RECOGNIZED[form] if record.get(field) is None]
    if missing:
        raise ConfigError(f"{missing[0]}: is missing; a record of the form {form} has {', '.join(_RECOGNIZED[form])}")
    return _READERS[form](record)


def _of_messages(record: Mapping[str, Any]) -> Conversation:
    return _conversation(*_messages("messages", record["messages"]), _tools(record.get("tools")))


def _of_sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = _list("conversations", record["conversations"])
    messages: list[Mapping[str, Any]] = []
    if system := _text("system", record.get("system")):
        messages.append({"role": "system", "content": system})
    first = len(messages)
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise ConfigError(f"{place}: must be an object with from and value, not {type(turn).__name__}")
        speaker = turn.get("from")
        if speaker not in _SHAREGPT_ROLES:
            raise ConfigError(f"{place}.from = {speaker!r}: no such role; there are {', '.join(_SHAREGPT_ROLES)}")
        value = _text(f"{place}.value", turn.get("value"))
        if speaker == "function_call":
            messages.append({"role": "assistant", "tool_calls": [_sharegpt_call(f"{place}.value", value)]})
        else:
            messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})

    def renamed(index: int) -> str:
        return "system" if index < first else f"conversations[{index - first}]"

    return _conversation(*_messages("messages", messages, renamed), _tools(record.get("tools")))


def _of_alpaca(record: Mapping[str, Any]) -> Conversation:
    messages: list[Mapping[str, Any]] = []
    places: list[str] = []

    def add(role: str, place: str, value: Any) -> None:
        messages.append({"role": role, "content": _text(place, value)})
        places.append(place)

    if _text("system", record.get("system")):
        add("system", "system", record["system"])
    for index, pair in enumerate(_list("history", record.get("history") or [])):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ConfigError(f"history[{index}]: must be a pair of an instruction and its output")
        add("user", f"history[{index}][0]", pair[0])
        add("assistant", f"history[{index}][1]", pair[1])
    given = _text("input", record.get("input"))
    add("user", "instruction", _text("instruction", record["instruction"]) + (f"\n{given}" if given.strip() else ""))
    add("assistant", "output", record["output"])
    return _conversation(*_messages("messages", messages, places.__getitem__))


def _of_completion(record: Mapping[str, Any]) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(*_messages("messages", texts, ("prompt", "completion").__getitem__))
    asked, answered = _list("prompt", prompt), _list("completion", completion)

    def renamed(index: int) -> str:
        return f"prompt[{index}]" if index < len(asked) else f"completion[{index - len(asked)}]"

    messages, replies = _messages("messages", [*asked, *answered], renamed)
    return _conversation(messages, [index for index in replies if index >= len(asked)], _tools(record.get("tools")))


_READERS: dict[ChatForm, Callable[[Mapping[str, Any]], Conversation]] = {
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "alpaca": _of_alpaca,
    "completion": _of_completion,
}


def _messages(
    field: str, values: Any, place_of: Callable[[int], str] | None = None
) -> tuple[Sequence[Message], list[int]]:
    """Messages and which of the assistant's may count; `place_of` names a message in errors."""
    given = [_usual(f"{field}[{index}]", value) for index, value in enumerate(_list(field, values))]
    try:
        messages = read_messages([message for message, _ in given])
    except ConfigError as error:
        text = str(error)
        for index in range(len(given)):
            if place_of is not None and text.startswith(f"messages[{index}]"):
                raise ConfigError(place_of(index) + text.removeprefix(f"messages[{index}]")) from error
        raise
    counted = [index for index, (_, counts) in enumerate(given) if counts and messages[index].role == "assistant"]
    return messages, counted


def _usual(place: str, value: Any) -> tuple[Any, bool]:
    """A message as `read_messages` takes it, and whether it may count."""
    if not isinstance(value, Mapping):
        return value, True
    fields = {name: part for name, part in value.items() if part is not None}
    if "reasoning" in fields:
        if fields.get("reasoning_content", fields["reasoning"]) != fields["reasoning"]:
            raise ConfigError(f"{place}: has reasoning and reasoning_content, which differ; leave one of them out")
        fields["reasoning_content"] = fields.pop("reasoning")
    weight = fields.pop("weight", 1)
    if weight not in (0, 1):
        raise ConfigError(f"{place}.weight = {weight!r}: must be 0 or 1")
    if isinstance(calls := fields.get("tool_calls"), Sequence):
        fields["tool_calls"] = [_call_with_text(call) for call in calls]
    return fields, bool(weight)


def _call_with_text(call: Any) -> Any:
    """A call whose arguments are JSON text, as OpenAI has them; data sets keep objects, too."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False, separators=(",", ":"))
    return {**call, "function": {**function, "arguments": arguments}}


def _sharegpt_call(place: str, value: str) -> dict[str, Any]:
    try:
        call = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: a function_call must be JSON with name and arguments ({error})") from error
    if not isinstance(call, Mapping):
        raise ConfigError(f"{place}: a function_call must be JSON with name and arguments")
    return dict(
        _call_with_text({"type": "function", "function": {name: call.get(name) for name in ("name", "arguments")}})
    )


def _conversation(
    messages: Sequence[Message], replies: Sequence[int], tools: tuple[Mapping[str, Any], ...] = ()
) -> Conversation:
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise ConfigError("no message is the assistant's, so nothing is there to learn; remove the record")
    if not replies:
        raise ConfigError("no message of the assistant counts (weight 0); remove the record")
    return Conversation(tuple(messages[: last + 1]), tuple(replies), tools, len(messages) - last - 1)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Tools as a list, or as the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tools: is a text but no JSON ({error})") from error
    tools = _list("tools", value or [])
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ConfigError(f"tools[{index}]: must be an object, not {type(tool).__name__}")
    return tuple(tools)


def _list(field: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{field}: must be a list, not {type(value).__name__}")
    return value


def _text(field: str, value: Any) -> str:
    """A text; empty for null or none."""
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{field}: must be a string, not {type(value).__name__}")
    return value or ""
