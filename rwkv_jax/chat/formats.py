"""Chat formats of RWKV models, as text around messages.

A conversation is one growing text: `first_turn`, the model's reply, `next_turn`, the next reply; each returns only the
text to append, since the state has read the rest. `render` writes a whole list of messages. A prompt ends with
`Assistant:` without a space: the first token of a reply includes it.

Sources: RWKV-v7/RWKV7-G1x-templates.txt of RWKV-LM (2026-07-18), for `WORLD` and for thinking and tools in `G1`;
ChatRWKV, for `RAVEN`; the README of RWKV-LM, for `PILE_QA`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.chat.messages import Message, clean, read_messages
from rwkv_jax.chat.replies import ReplyParser
from rwkv_jax.chat.template import Piece, Thinking, ToolChoice
from rwkv_jax.chat.tools import tools_block, write_calls
from rwkv_jax.config import ConfigError

_OPENINGS: dict[str, str] = {
    "none": "",
    "open": " <think",
    "think": " <think",
    "think a bit": " <think",
    "think a lot": " <think",
    "closed": " <think>\n</think",
    "empty": " <think></think",
}
_CALL_OPENING = " ```json"
_FUNCTION_OUTPUT = "Function output:\n"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The text around the messages of a conversation; a `ChatTemplate`."""

    before_message: str
    """Starts a turn; `User: `."""
    before_reply: str
    """Ends the message and prompts for a reply; `\\n\\nAssistant:`, with nothing after the colon."""
    separator: str = "\n\n"
    """Ends a reply or a system message. Removed from messages."""
    before_system: str | None = None
    """Starts a system message; None if the format has none."""
    begins_with: str = ""
    """Starts the conversation."""
    stop_strings: tuple[str, ...] = ()
    """Stop strings of a reply: the start of the next turn. The end-of-text token ends one, too."""
    is_g1: bool = False
    """Whether models of this format think and call tools."""
    thinking: Thinking = "none"
    """Thinking mode."""

    def __post_init__(self) -> None:
        self._check_thinking(self.thinking)
        if self.before_reply.endswith(" "):
            raise ConfigError(f"before_reply = {self.before_reply!r}: leave out the space; replies bring their own")

    def first_turn(self, message: str, system: str | None = None) -> str:
        """Text that starts a conversation, up to the reply.

        Raises:
          ConfigError: an empty message, or a system message in a format that has none.
        """
        start = "" if system is None else self._system_part(system, None) + self.separator
        return self.begins_with + start + self._turn(message)

    def next_turn(self, message: str, reply: str = "") -> str:
        """Text to append after a reply, up to the next one.

        Args:
          reply: all text since the previous turn, including the stop string; the part of the turn separator that it
            already ends with is not repeated.

        Raises:
          ConfigError: an empty message.
        """
        opening = self.separator + self.before_message
        longest = min(len(opening), len(reply))
        read = next(length for length in range(longest, -1, -1) if reply.endswith(opening[:length]))
        return (self.separator + self._turn(message))[read:]

    def closing(self, reply: str) -> str:
        """Text to append to close a reply, which is all text since its turn, so that any turn may follow."""
        length = len(self.separator)
        while not reply.endswith(self.separator[:length]):
            length -= 1
        return self.separator[length:]

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

        Each of the user's messages requests thinking in the same way, as in a conversation by turns. What the assistant
        thought is written where it is given. With tools a reply is begun as a call, unless thinking comes first.
        """
        if variables:
            raise ConfigError(f"variables {', '.join(variables)}: are for Jinja templates; this chat format has none")
        thinking = self.thinking if thinking is None else thinking
        self._check_thinking(thinking)
        self._check_tools(tools)
        read = read_messages(messages)
        last = f"messages[{len(read) - 1}]"
        if continue_final_message and (read[-1].role != "assistant" or read[-1].tool_calls):
            raise ConfigError(f"{last}: continue_final_message needs the assistant's text at the end")
        if not continue_final_message and add_generation_prompt and read[-1].role in ("system", "assistant"):
            raise ConfigError(
                f"{last}: is the {read[-1].role}'s, which asks for no reply; end with a message of the user or a tool, "
                "or set continue_final_message"
            )
        opened = len(read) - 1 if continue_final_message else None
        text = "".join(piece.text for piece in self._pieces(read, tools, tool_choice, thinking, opened))
        if add_generation_prompt and not continue_final_message:
            opens_call = bool(tools) and tool_choice == "required" and thinking == "none"
            text += self.separator + self._reply_header + (_CALL_OPENING if opens_call else _OPENINGS[thinking])
        return text

    def pieces(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        replies: Collection[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "required",
    ) -> list[Piece]:
        """A finished conversation in parts, as `ChatTemplate.pieces` says; no thinking is requested."""
        self._check_tools(tools)
        found = self._pieces(read_messages(messages), tools, tool_choice, "none")
        return found if replies is None else [piece if piece.reply in replies else Piece(piece.text) for piece in found]

    def _pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: ToolChoice,
        thinking: str,
        opened: int | None = None,
    ) -> list[Piece]:
        """The text of messages, of which one may be open, in pieces."""
        pieces, separator = [Piece(self.begins_with)], ""
        if tools and messages[0].role != "system":
            pieces.append(Piece(self._system_part("", tools_block(tools, tool_choice))))
            separator = self.separator
        for index, message in enumerate(messages):
            place = f"messages[{index}]"
            self._check_order(place, message, messages[index - 1].role if index else None)
            if message.role == "system":
                block = tools_block(tools, tool_choice) if tools else None
                pieces.append(Piece(separator + self._system_part(message.content, block)))
            elif message.role == "assistant":
                pieces.append(Piece(separator + self._reply_header))
                pieces.append(Piece(self._reply_part(place, message, index == opened), index))
            else:
                pieces.append(Piece(separator + self._message_part(message, thinking)))
            separator = self.separator
        return pieces

    def reply_parser(self, prompt: str, *, calls: bool = False) -> ReplyParser:
        """A parser for the reply to a prompt, which may end with the start of a think block or of a call."""
        return ReplyParser(prompt.rpartition(self.before_reply)[2], thinks=self.is_g1, calls=calls and self.is_g1)

    @property
    def _reply_header(self) -> str:
        return self.before_reply.removeprefix(self.separator)

    def _check_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        if tools and not self.is_g1:
            raise ConfigError("tools: this chat format has none; take a G1 model with the template g1")

    def _check_thinking(self, thinking: str) -> None:
        if thinking not in _OPENINGS:
            raise ConfigError(f"thinking = {thinking!r}: must be one of {', '.join(_OPENINGS)}")
        if thinking != "none" and not self.is_g1:
            raise ConfigError(f"thinking = {thinking!r}: this chat format has none; take a G1 model, or thinking none")

    def _check_order(self, place: str, message: Message, before: str | None) -> None:
        """Checks that a message can be told from the one before it."""
        if message.role == "system" and before is not None:
            raise ConfigError(f"{place}: the system's message comes first and alone; join it with the first one")
        if message.role == before and before in ("user", "assistant"):
            raise ConfigError(f"{place}: is the second in a row of the {before}; join the two")
        if (message.role == "tool" or message.tool_calls) and not self.is_g1:
            raise ConfigError(f"{place}: this chat format has no tools; take a G1 model with the template g1")
        if message.reasoning and not self.is_g1:
            raise ConfigError(f"{place}: this chat format has no reasoning; leave it out")

    def _system_part(self, system: str, tools: str | None) -> str:
        if self.before_system is None:
            raise ConfigError(
                f"system = {system!r}: this chat format has no system message; put it in the first message"
            )
        texts = [tools] if tools and not system else [_cleaned("system", system), *([tools] if tools else [])]
        return self.before_system + "\n".join(texts)

    def _turn(self, message: str) -> str:
        _cleaned("message", message)
        header = self.separator + self._reply_header
        return self._message_part(Message("user", message), self.thinking) + header + _OPENINGS[self.thinking]

    def _message_part(self, message: Message, thinking: str) -> str:
        if message.role == "tool":
            return (self.before_message + _FUNCTION_OUTPUT + clean(message.content)).rstrip()
        asked = f" ({thinking})" if thinking.startswith("think") else ""
        return self.before_message + clean(message.content) + asked

    def _reply_part(self, place: str, message: Message, is_open: bool) -> str:
        """A reply without its header; open if it goes on."""
        space = "" if self.before_reply.endswith("\n") else " "
        content = self._without_turns(message.content.replace("\r\n", "\n").lstrip("\n"))
        content = content if is_open else content.rstrip()
        reasoning = self._without_turns(message.reasoning.replace("\r\n", "\n").strip())
        if "<think>" in reasoning or "</think>" in reasoning:
            raise ConfigError(f"{place}: reasoning has a <think> marker; leave the markers out")
        if reasoning and is_open and not content:
            return f"{space}<think>\n{reasoning}"
        thoughts = f"{space}<think>\n{reasoning}\n</think>\n" if reasoning else ""
        calls = write_calls(message.tool_calls)
        answer = content + ("\n" if content and calls else "") + calls
        return thoughts + answer if thoughts else space + answer

    def _without_turns(self, text: str) -> str:
        """A reply's text, which may have blank lines, without what would begin another turn."""
        headers = (self.before_message, self._reply_header, self.before_system or self.before_message)
        starts = "|".join(re.escape(header.strip()) for header in headers)
        return re.sub(rf"\n{{2,}}(?={starts})", "\n", text)


def _cleaned(name: str, text: str) -> str:
    cleaned = clean(text) if isinstance(text, str) else ""
    if not cleaned:
        raise ConfigError(f"{name} = {text!r}: is empty; give it some text")
    return cleaned


WORLD = ChatFormat(
    before_message="User: ",
    before_reply="\n\nAssistant:",
    before_system="System: ",
    stop_strings=("\n\nUser:", "\n\nSystem:"),
)
"""World models, generations 5 to 7."""

G1 = dataclasses.replace(WORLD, is_g1=True)
"""RWKV-7 G1 models, which think and call tools."""

RAVEN = ChatFormat(
    before_message="Bob: ",
    before_reply="\n\nAlice:",
    stop_strings=("\n\nBob:", "\n\nAlice:"),
)
"""RWKV-4 Raven."""

PILE_QA = ChatFormat(
    before_message="Question:\n",
    before_reply="\n\nDetailed Expert Answer:\n",
    begins_with="\nQ & A\n\n",
    stop_strings=("\n\nQuestion:",),
)
"""Base models trained on the Pile, without chat training."""


@functools.cache
def g1_in_jinja() -> str:
    """`G1` as a Jinja template for other programs; it also writes what `WORLD` writes.

    The variables that it takes are told at its beginning. Whether a reply must be a call is its variable `tool_choice`,
    "auto" by default, and an empty think block is that of thinking "empty".
    """
    return Path(__file__).with_name("g1.jinja").read_text(encoding="utf-8")
