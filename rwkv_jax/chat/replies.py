"""Parts of a reply: thinking, answer and tool calls, while it arrives and at its end.

A reply is read a character at a time, so it has the same parts however it is split. What may still become a marker
(`<think>`, `</think>`, the start of a call) is held back, and shown as text at the character with which it cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

from rwkv_jax.chat.calls import FENCE, HEADING, TAG, CallScanner, NoMatchError, Scan
from rwkv_jax.chat.messages import ToolCall

Kind = Literal["reasoning", "content", "tool_call", "hidden"]

_THINK, _END_OF_THOUGHTS = "<think>", "</think>"


class Delta(NamedTuple):
    """A piece of a reply. The texts of all its deltas, joined, are the reply."""

    kind: Kind
    """`hidden` are markers, and white space around what they separate."""
    text: str
    """Characters of the reply; of a call, all of its own."""
    call: ToolCall | None = None
    """The call, which is a delta of its own."""


class Reply(NamedTuple):
    """A reply in parts."""

    reasoning: str = ""
    """Thinking, without space around it."""
    content: str = ""
    """The answer, without its leading space, line breaks before and space behind it."""
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> Reply:
        """The parts in a reply's deltas."""
        deltas = tuple(deltas)
        reasoning, content = ("".join(text for kind, text, _ in deltas if kind == k) for k in ("reasoning", "content"))
        return cls(reasoning, content, tuple(call for *_, call in deltas if call is not None))


class ReplyParser:
    """Splits one reply as it arrives.

    Thinking is a `<think>` block at the start. What is malformed is text: thinking that is not closed stays thinking, a
    call that is not one is content.
    """

    def __init__(self, opening: str = "", *, thinks: bool = True, calls: bool = False) -> None:
        """Before the first character.

        Args:
          opening: what the prompt has already of the reply, such as ` <think`; it is no part of any delta.
          thinks: look for thinking.
          calls: look for tool calls; at starts of lines, outside thinking.
        """
        self._thinks, self._calls = thinks, calls
        self._kind: Literal["reasoning", "content"] = "content"
        self._is_empty = True  # nothing but white space yet, of this kind
        self._dropped = " \n"  # white space that is not shown at the start of content: one space, then line breaks
        self._begins_line = True
        self._space = ""  # shown if text follows
        self._held = ""  # may become a marker
        self._marker: Scan[str | ToolCall] | None = None
        self._scanner = CallScanner()
        self._deltas: list[Delta] = []
        self.push(opening)
        self._space = self._held = ""
        self._opened_in_prompt = self._marker is not None

    def push(self, text: str) -> list[Delta]:
        """Deltas of what is decided by these characters, in order."""
        todo = list(reversed(text))
        while todo:
            char = todo.pop()
            if self._marker is None:
                self._start_marker(char)
                if self._marker is None:
                    self._show(char)
                continue
            self._held += char
            try:
                self._marker.send(char)
            except StopIteration as done:
                self._finish(done.value)
            except NoMatchError:
                todo += reversed(self._release())
        return self._take()

    def flush(self) -> list[Delta]:
        """Deltas of what was held back, at the end of the reply. A call that lacks only its closing marker counts."""
        deltas: list[Delta] = []
        while self._marker is not None:
            if self._scanner.call is not None:
                self._finish(self._scanner.call)
            else:
                deltas += self.push(self._release())
        self._add("hidden", self._space)
        self._space = ""
        return _joined([*deltas, *self._take()])

    def _start_marker(self, char: str) -> None:
        """Looks for a marker from this character on, if one may begin with it."""
        if self._kind == "reasoning":
            words = [_END_OF_THOUGHTS]
        else:
            words = [_THINK] * (self._thinks and self._is_empty)
            words += [HEADING, FENCE, TAG] * (self._calls and self._begins_line)
        if not any(word.startswith(char) for word in words):
            return
        self._scanner = CallScanner()
        self._marker = self._find(words)
        next(self._marker)
        self._marker.send(char)
        self._held, self._opened_in_prompt = char, False

    def _find(self, words: list[str]) -> Scan[str | ToolCall]:
        """Which of some words comes, or the call that it begins."""
        text = yield
        while text not in words:
            if not any(word.startswith(text) for word in words):
                raise NoMatchError
            text += yield
        return text if text in (_THINK, _END_OF_THOUGHTS) else (yield from self._scanner.scan(text))

    def _finish(self, found: str | ToolCall) -> None:
        """A marker is complete."""
        self._add("hidden", self._space)
        if isinstance(found, ToolCall):
            self._add("tool_call", self._held, found)
        else:
            self._add("hidden", self._held)
            self._kind, self._is_empty = "reasoning" if found == _THINK else "content", True
        self._thinks, self._dropped = False, " \n"
        self._space, self._held, self._marker, self._begins_line = "", "", None, True
        self._scanner = CallScanner()

    def _release(self) -> str:
        """What was held is no marker: shows its first character, which is where one might have begun."""
        text, self._held, self._marker = self._held, "", None
        if self._opened_in_prompt:
            self._is_empty = self._begins_line = False
            return text
        self._show(text[0])
        return text[1:]

    def _show(self, char: str) -> None:
        """A character that is no part of a marker."""
        if char.isspace():
            self._begins_line = char == "\n" or self._begins_line
            if self._is_empty and (self._kind == "reasoning" or char in self._dropped):
                self._dropped = "\n"
                self._add("hidden", char)
            else:
                self._dropped = ""
                self._space += char
            return
        self._begins_line = self._is_empty = False
        self._dropped = ""
        self._add(self._kind, self._space + char)
        self._space = ""

    def _add(self, kind: Kind, text: str, call: ToolCall | None = None) -> None:
        if text or call is not None:
            self._deltas.append(Delta(kind, text, call))

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return _joined(deltas)


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbors of a kind as one, calls apart."""
    joined: list[Delta] = []
    for kind, group in itertools.groupby(deltas, key=lambda delta: delta.kind):
        some = list(group)
        joined += some if kind == "tool_call" else [Delta(some[0].kind, "".join(delta.text for delta in some))]
    return joined
