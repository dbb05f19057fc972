"""Chat templates in Jinja that lie beside a tokenizer: chat_template.jinja, or in tokenizer_config.json.

They are given what transformers gives them, except that `bos_token` and `eos_token` are empty: the engine begins each
text with the end-of-text token, and a conversation goes on in one text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rwkv_jax.chat.formats import g1_in_jinja
from rwkv_jax.chat.messages import Message, ToolCall, read_messages
from rwkv_jax.chat.replies import ReplyParser
from rwkv_jax.chat.template import Piece, Thinking, ToolChoice, begins_thinking
from rwkv_jax.config import ConfigError
from rwkv_jax.json_object import parse_object

if TYPE_CHECKING:
    from rwkv_jax.chat.sandbox import Compiled

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
"""Files of a tokenizer's folder in which a template is looked for, in this order."""

_MAX_BYTES = 2**24
_BEGUN = re.compile(r"(?:<think(?:>\s*(?:</think>?\s*)?)?|```(?:json)?\s*)\Z")  # a reply in a prompt
_THINKING = ("thinking", "enable_thinking")
_EFFORTS = {"think a bit": "low", "think": "medium", "think a lot": "high"}
_MARK = "\ue000\ue001"  # of the private use area: no text has it
_PROBE = ("first-question", "first-answer", "second-question")


class JinjaTemplate:
    """A `ChatTemplate` in Jinja."""

    def __init__(self, source: str, name: str = TEMPLATE_FILE) -> None:
        """From a template's text; `name` is its place, for messages.

        Raises:
          ConfigError: it is no template, or jinja2 is missing.
        """
        try:
            from rwkv_jax.chat.sandbox import compile_template
        except ImportError as error:
            raise ConfigError(
                f'{name} needs the package jinja2: pip install "rwkv-jax[serve]", or name another template, such as g1'
            ) from error
        self.name = name
        self._template: Compiled = self._guarded(lambda: compile_template(source))
        self._stop_strings = self._find_stop_strings()

    @classmethod
    def beside(cls, folder: Path) -> Self | None:
        """The template in a tokenizer's folder, or None.

        Raises:
          ConfigError: a file that is too large, is not UTF-8 or not JSON, or as `__init__`.
        """
        found = read_template(folder)
        return None if found is None else cls(*found)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The template in a file. Raises ConfigError as `beside`."""
        return cls(_text_in(path), str(path))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What the template writes between a reply and the next message of the user."""
        return self._stop_strings

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "required",
        thinking: Thinking | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, as `ChatTemplate.render` says.

        Whether a reply must be a call is the model's choice. Thinking sets the variables `thinking` and
        `enable_thinking`, which are switches, and a length of it also `reasoning_effort`; a template that reads neither
        is refused, and so are `variables` that it does not read.
        """
        unread = [name for name in variables or () if name not in self._template.reads]
        if unread:
            raise ConfigError(f"variables {', '.join(unread)}: {self.name} does not read them; leave them out")
        read = read_messages(messages)
        written = self._marked(read) if continue_final_message else read
        asked = {**self._switches(thinking), **(variables or {})}
        given = _given(written, tools, add_generation_prompt and not continue_final_message, asked)
        text = self._guarded(lambda: self._template.render(given))
        return self._up_to_mark(text, read) if continue_final_message else text

    def pieces(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        replies: Collection[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "required",
    ) -> list[Piece]:
        """A finished conversation in parts, as `ChatTemplate.pieces` says; a reply has what the template ends it with.

        Found by rendering the messages up to each reply, with and without it. Where a template writes a reply otherwise
        when it is asked for, as with thinking that earlier replies lack, replies are what it marks by {% generation %}.
        """
        read = read_messages(messages)
        own = [index for index, message in enumerate(read) if message.role == "assistant"]
        wanted = own if replies is None else sorted(replies)

        def text_of(count: int, asks: bool) -> str:
            arguments: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "add_generation_prompt": asks}
            return self.render(read[:count], **arguments)

        whole, pieces, end = text_of(len(read), False), list[Piece](), 0
        for index in wanted:
            asked, answered = text_of(index, True) if index else "", text_of(index + 1, False)
            if not whole.startswith(answered) or not answered.startswith(asked) or len(asked) < end:
                return self._marked_pieces(whole, read, own, wanted, tools, index)
            pieces += [Piece(whole[end : len(asked)]), Piece(whole[len(asked) : len(answered)], index)]
            end = len(answered)
        return [*pieces, Piece(whole[end:])]

    def _marked_pieces(
        self,
        whole: str,
        messages: Sequence[Message],
        own: Sequence[int],
        wanted: Sequence[int],
        tools: Sequence[Mapping[str, Any]] | None,
        refused: int,
    ) -> list[Piece]:
        """The pieces by the template's own marks; ConfigError about the message `refused` if it has none."""
        render = self._template.render_marked
        if render is None:
            raise ConfigError(
                f"messages[{refused}]: {self.name} writes it otherwise when a reply is asked for or when others "
                "follow, so its text in a conversation is not the one that is asked for; take replies at the end "
                "only, or another template"
            )
        from rwkv_jax.chat.sandbox import BEGIN_GENERATION, END_GENERATION

        text: str = self._guarded(lambda: render(_given(messages, tools, False, {})))
        parts = re.split(f"({BEGIN_GENERATION}|{END_GENERATION})", text)
        marks, parts = parts[1::2], parts[::2]
        if "".join(parts) != whole or marks != [BEGIN_GENERATION, END_GENERATION] * len(own):
            raise ConfigError(
                f"messages[{refused}]: {self.name} has {len(marks) // 2} texts marked by generation, and the assistant "
                f"{len(own)} messages, so which is which is not known; take another template"
            )
        numbers = [index if index in wanted else None for index in own]
        return [Piece(part, numbers[at // 2] if at % 2 else None) for at, part in enumerate(parts)]

    def reply_parser(self, prompt: str, *, calls: bool = False) -> ReplyParser:
        """A parser for the reply to a prompt, which may end with the start of a think block or of a call."""
        begun = _BEGUN.search(prompt, max(0, len(prompt) - 256))
        return ReplyParser(begun[0] if begun else "", calls=calls)

    def _switches(self, thinking: Thinking | None) -> dict[str, Any]:
        """Variables for a way of thinking."""
        if thinking is None or thinking == "none":
            return {}
        effort = {"reasoning_effort": _EFFORTS[thinking]} if thinking in _EFFORTS else {}
        needed = [*effort] or [name for name in _THINKING if name in self._template.reads]
        if not needed or not self._template.reads.issuperset(needed):
            names = "reasoning_effort" if effort else " or ".join(_THINKING)
            raise ConfigError(
                f"thinking = {thinking!r}: {self.name} does not read {names}; leave it out, or name the template g1"
            )
        return dict.fromkeys(_THINKING, begins_thinking(thinking)) | effort

    def _find_stop_strings(self) -> tuple[str, ...]:
        first, answer, second = _PROBE
        probe = [Message("user", first), Message("assistant", answer), Message("user", second)]
        try:
            text = self.render(probe, add_generation_prompt=False)
        except ConfigError:  # it wants more than that
            return ()
        between = text.rpartition(answer)[2].partition(second)[0].rstrip()
        return (between,) if between else ()

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with a mark where the last one's content ends, at which the text is cut to continue it."""
        last, place = messages[-1], f"messages[{len(messages) - 1}]"
        content = last.content.strip()
        if last.role != "assistant" or not content or last.tool_calls:
            raise ConfigError(f"{place}: continue_final_message needs the assistant's text at the end")
        return [*messages[:-1], dataclasses.replace(last, content=content + _MARK)]

    def _up_to_mark(self, text: str, messages: Sequence[Message]) -> str:
        before, found, _ = text.rpartition(_MARK)
        if not found or not before.endswith(messages[-1].content.strip()):
            place = f"messages[{len(messages) - 1}]"
            raise ConfigError(f"{place}: {self.name} does not write it as it is, so it cannot be continued")
        return before

    def _guarded(self, function: Callable[[], Any]) -> Any:
        """Runs what a template may let fail in any way."""
        try:
            result = function()
            if isinstance(result, str):
                result.encode()
            return result
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            number = getattr(error, "lineno", None)
            line = "" if number is None else f", line {number}"
            raise ConfigError(f"{self.name}{line}: {reason}; mend the messages, or name another template") from error


def read_template(folder: Path) -> tuple[str, str] | None:
    """The text of the template in a tokenizer's folder and its place, or None; needs no jinja2.

    Raises:
      ConfigError: a file that is too large, is not UTF-8 or not JSON.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return _text_in(path), str(path)
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    source = parse_object(_read(path), path).get("chat_template")
    if isinstance(source, list):  # several by name
        named = (item for item in source if isinstance(item, Mapping) and item.get("name") == "default")
        source = next((item.get("template") for item in named), None)
    return (source, f"{path}: chat_template") if isinstance(source, str) else None


def read_foreign_template(folder: Path) -> tuple[str, str] | None:
    """As `read_template`, but None for `g1_in_jinja`, whose text the formats write without jinja2."""
    found = read_template(folder)
    return None if found is None or found[0] == g1_in_jinja() else found


def _text_in(path: Path) -> str:
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error}); convert it") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {_MAX_BYTES} bytes, so it is no template; get the file again")
    return content


def _given(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """What transformers gives a template."""
    return {
        "bos_token": "",
        "eos_token": "",
        "documents": None,
        **variables,
        "messages": [_as_mapping(message) for message in messages],
        "tools": [_as_function(tool) for tool in tools] if tools else None,
        "add_generation_prompt": add_generation_prompt,
    }


def _as_mapping(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to templates."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    optional = {"reasoning_content": message.reasoning, "tool_call_id": message.tool_call_id, "name": message.name}
    fields |= {name: text for name, text in optional.items() if text}
    if message.tool_calls:
        fields["tool_calls"] = [_as_call(call) for call in message.tool_calls]
    return fields


def _as_call(call: ToolCall) -> dict[str, Any]:
    from rwkv_jax.chat.sandbox import JSONText

    function = {"name": call.name, "arguments": JSONText(call.arguments)}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}


def _as_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}
