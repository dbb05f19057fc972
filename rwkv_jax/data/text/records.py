"""Texts from one field of JSON records: JSON lines, arrays of objects, and concatenated objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.files import inner_suffix, open_text

LINES_SUFFIXES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines: files with one record per line."""
SUFFIXES = (*LINES_SUFFIXES, ".json")
"""Suffixes of all files of JSON records."""

_READ_CHARACTERS = 2**20
_MAX_TOKEN = 16  # a word, number or escape may be cut at the end of the buffer
_SPACE = re.compile(r"[ \t\n\r]*")
_MARK = "\ufeff"
_OF_CHATS = frozenset(("messages", "conversations", "instruction", "completion"))


def has_records(name: str) -> bool:
    """Whether a file contains JSON records, by its suffix."""
    return inner_suffix(name) in SUFFIXES


def read_records(path: Path, field: str) -> Iterator[str]:
    """The texts of a field, record by record; one record is in memory at a time.

    Raises ConfigError with file and line for invalid JSON, a record that is not an object, and a field that is missing,
    not a string or not Unicode.
    """
    for place, record in read_objects(path):
        yield _text_of(record, place, field)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each record, `FILE: line 3`; one is in memory at a time.

    Raises ConfigError with file and line for invalid JSON and for a record that is not an object.
    """
    records = _json_lines(path) if inner_suffix(path.name) in LINES_SUFFIXES else _json_values(path)
    for line, record in records:
        place = f"{path}: line {line}"
        if not isinstance(record, dict):
            raise ConfigError(f"{place} is not a JSON object but {type(record).__name__}; mend or remove it")
        yield place, record


def first_record_has_text(path: Path, field: str) -> bool:
    """Whether a .json file contains records with texts rather than other data."""
    try:
        return next(read_records(path, field), None) is not None
    except ConfigError:
        return False


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and record of each non-blank line."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_MARK) if number == 1 else line
            if not line.strip():
                continue
            try:
                line.encode()  # bytes that are not UTF-8 were read as lone surrogates
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from error
            yield number, record


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each item of an array, or of each value in a sequence."""
    with open_text(path) as file:
        scanner = _Scanner(path, file)
        is_array, is_first = scanner.take("["), True
        while character := scanner.peek():
            if is_array and scanner.take("]"):
                break
            if is_array and not is_first and not scanner.take(","):
                raise _not_json(path, scanner.line, f"no comma before {character!r}")
            yield scanner.value()
            is_first = False
        else:
            if is_array:
                raise _not_json(path, scanner.line, "the array has no end")
        if is_array and (rest := scanner.peek()):
            raise _not_json(path, scanner.line, f"{rest!r} follows the array")


class _Scanner:
    """Parses JSON values from a text stream, with little more than one value in memory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._at, self.line = "", 0, 1
        self._decode = json.JSONDecoder().raw_decode
        self._read()
        self._buffer = self._buffer.removeprefix(_MARK)

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end; it is not consumed."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None  # it may be empty
            self._advance(match.end())
            if self._at < len(self._buffer) or not self._read():
                return self._buffer[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Consumes the next character if it is this one; returns whether it was."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> tuple[int, Any]:
        """Consumes the next value; returns the line where it starts and the value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
                break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _MAX_TOKEN
                line = self.line + self._buffer.count("\n", self._at, error.pos)  # before the buffer is another one
                if not (is_cut and self._read()):
                    raise _not_json(self._path, line, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise _not_json(self._path, self.line, error) from error
        line = self.line
        self._advance(end)
        return line, value

    def _advance(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _read(self) -> bool:
        """Reads more, doubling the buffer so that a large value is retried only a few times; False at the end."""
        held = self._buffer[self._at :]
        more = self._file.read(max(_READ_CHARACTERS, len(held)))
        try:
            more.encode()  # bytes that are not UTF-8 were read as lone surrogates
        except UnicodeEncodeError as error:
            line = self.line + held.count("\n") + more.count("\n", 0, error.start)
            raise _not_json(self._path, line, error) from error
        self._buffer, self._at = held + more, 0
        return bool(more)


def _text_of(record: dict[str, Any], place: str, field: str) -> str:
    if field not in record:
        chats = ", or data.chat to auto if these are chats" if _OF_CHATS.intersection(record) else ""
        raise ConfigError(f"{place} has no field {field!r}; set data.text_field to one of {sorted(record)}{chats}")
    text = record[field]
    if not isinstance(text, str):
        raise ConfigError(f"{place}: field {field!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: field {field!r} has half a surrogate pair at character {error.start}") from error
    return text


def _not_json(path: Path, line: int, reason: Exception | str) -> ConfigError:
    if isinstance(reason, UnicodeEncodeError):
        wrong = reason.object[reason.start : reason.start + 1].encode(errors="surrogateescape")
        reason = f"the byte {wrong!r} is not UTF-8"
    return ConfigError(f"{path}: line {line} is not JSON in UTF-8 ({reason}); mend or remove it")
