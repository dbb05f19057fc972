"""Tool calls in a reply, recognized a character at a time.

Each function is a generator of the grammar: it takes the first character, is sent those that follow, and returns the
first one that it does not use. `NoMatchError` is raised at the first character with which the text can no longer
become a call. The forms are those of the G1 templates and of their predecessors:

    **Tool Call:**                     (or without this line)
    ```json
    {"name": "...", "arguments": {...}}
    ```
    <tool_call>{"name": "...", "arguments": {...}}</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import TypeVar

from rwkv_jax.chat.messages import ToolCall

_Result = TypeVar("_Result")
Scan = Generator[None, str, _Result]
"""Is sent characters."""

HEADING, FENCE, TAG = "**Tool Call:**", "```", "<tool_call>"
"""With one of these a call begins."""
MAX_DEPTH = 64
"""Objects and arrays within each other in the arguments of a call."""

_SPACE, _DIGITS = " \t\r\n", "0123456789"
_CLOSING_TAG = "</tool_call>"


class NoMatchError(Exception):
    """The text is not what was looked for, whatever follows."""


class CallScanner:
    """Recognizes one call behind its first marker."""

    def __init__(self) -> None:
        """Before any character."""
        self.call: ToolCall | None = None
        """The call, from its closing brace on."""
        self._text: list[str] = []

    def scan(self, marker: str) -> Scan[ToolCall]:
        """The rest of a call behind `HEADING`, `FENCE` or `TAG`; returns at its last character."""
        char = yield from self._next()
        if marker == HEADING:
            char = yield from self._literal(FENCE, (yield from self._skip(char)))
        if marker != TAG and char == "j":
            char = yield from self._literal("json", char)
        char = yield from self._object_of_call((yield from self._skip(char)))
        char = yield from self._skip(char)
        closing = _CLOSING_TAG if marker == TAG else FENCE
        for expected in closing[:-1]:
            char = yield from self._expect(expected, char)
        _require(char == closing[-1])
        assert self.call is not None
        return self.call

    def _next(self) -> Scan[str]:
        char = yield
        self._text.append(char)
        return char

    def _expect(self, expected: str, char: str) -> Scan[str]:
        _require(char == expected)
        return (yield from self._next())

    def _literal(self, word: str, char: str) -> Scan[str]:
        for expected in word:
            char = yield from self._expect(expected, char)
        return char

    def _skip(self, char: str) -> Scan[str]:
        """White space."""
        while char in _SPACE:
            char = yield from self._next()
        return char

    def _object_of_call(self, char: str) -> Scan[str]:
        """{"name": string, "arguments": object}, in any order."""
        values: dict[str, str] = {}
        char = yield from self._skip((yield from self._expect("{", char)))
        while True:
            rest = [f'"{key}"' for key in ("name", "arguments") if key not in values]
            key, char = yield from self._one_of(rest, char)
            char = yield from self._skip(char)
            char = yield from self._skip((yield from self._expect(":", char)))
            _require(char == ('"' if key == '"name"' else "{"))
            begin = len(self._text) - 1
            char = yield from self._value(char, MAX_DEPTH)
            values[key.strip('"')] = "".join(self._text[begin:-1])
            char = yield from self._skip(char)
            if len(values) == 2:
                break
            char = yield from self._skip((yield from self._expect(",", char)))
        _require(char == "}")
        name = json.loads(values["name"])
        # An escaped lone surrogate is JSON, but no text that could be sent on.
        _require(bool(name.strip()) and name == name.encode(errors="ignore").decode())
        self.call = ToolCall(name, values["arguments"])
        return (yield from self._next())

    def _one_of(self, words: list[str], char: str) -> Scan[tuple[str, str]]:
        """Which of some words, none the beginning of another, and the character behind it."""
        text = char
        while text not in words:
            _require(any(word.startswith(text) for word in words))
            text += yield from self._next()
        return text, (yield from self._next())

    def _value(self, char: str, depth: int) -> Scan[str]:
        """Any JSON value (RFC 8259)."""
        _require(depth > 0)
        if char == '"':
            return (yield from self._string(char))
        if char in "{[":
            return (yield from self._container(char, depth))
        for word in ("true", "false", "null"):
            if char == word[0]:
                return (yield from self._literal(word, char))
        return (yield from self._number(char))

    def _container(self, char: str, depth: int) -> Scan[str]:
        closing = "}" if char == "{" else "]"
        char = yield from self._skip((yield from self._next()))
        if char == closing:
            return (yield from self._next())
        while True:
            if closing == "}":
                _require(char == '"')
                char = yield from self._skip((yield from self._string(char)))
                char = yield from self._skip((yield from self._expect(":", char)))
            char = yield from self._skip((yield from self._value(char, depth - 1)))
            if char == closing:
                return (yield from self._next())
            char = yield from self._skip((yield from self._expect(",", char)))

    def _string(self, char: str) -> Scan[str]:
        char = yield from self._expect('"', char)
        while char != '"':
            _require(char >= " ")
            if char == "\\":
                char = yield from self._next()
                if char == "u":
                    for _ in range(3):
                        char = yield from self._next()
                        _require(char in "0123456789abcdefABCDEF")
                    char = yield from self._next()
                    _require(char in "0123456789abcdefABCDEF")
                else:
                    _require(char in '"\\/bfnrt')
            char = yield from self._next()
        return (yield from self._next())

    def _number(self, char: str) -> Scan[str]:
        if char == "-":
            char = yield from self._next()
        char = (yield from self._next()) if char == "0" else (yield from self._digits(char))
        if char == ".":
            char = yield from self._digits((yield from self._next()))
        if char in "eE":
            char = yield from self._next()
            if char in "+-":
                char = yield from self._next()
            char = yield from self._digits(char)
        return char

    def _digits(self, char: str) -> Scan[str]:
        _require(char in _DIGITS)
        while char in _DIGITS:
            char = yield from self._next()
        return char


def _require(condition: bool) -> None:
    if not condition:
        raise NoMatchError
