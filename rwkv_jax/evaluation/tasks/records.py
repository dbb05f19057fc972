"""Reads tasks' files: JSON lines whose errors name file, line and field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.checks import ConfigError, is_whole, shown
from rwkv_jax.data.text.files import COMPRESSED, open_text


class Record:
    """A JSON object of a file. What is missing or of another type is a `ConfigError` with file, line and field."""

    def __init__(self, values: Mapping[str, Any], place: str, prefix: str = "") -> None:
        """Args: place: file and line, for messages; prefix: of the names of fields, for objects within objects."""
        self.values = values
        self.place = place
        self._prefix = prefix

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def error(self, field: str, remedy: str) -> ConfigError:
        """What is wrong with a field."""
        value = f" = {shown(self.values[field])}" if field in self.values else ""
        return ConfigError(f"{self.place}: {self._prefix}{field}{value}: {remedy}")

    def get(self, field: str) -> Any:
        """A field's value, of any type."""
        if field not in self.values:
            there = ", ".join(map(str, self.values)) or "none"
            near = difflib.get_close_matches(field, list(self.values), n=1)
            meant = f"; is {near[0]} meant?" if near else ""
            raise self.error(field, f"is missing; the fields are {there}{meant}")
        return self.values[field]

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        """A text."""
        value = self.get(field)
        if not isinstance(value, str):
            raise self.error(field, "must be a text")
        if not value and not may_be_empty:
            raise self.error(field, "must not be empty")
        return self._unicode(field, value)

    def texts(self, field: str, count: int | None = None, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """A list of texts, of this length if given, else of two at least; `may_be_empty` is about each text."""
        value = self.get(field)
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not is_list or not (may_be_empty or all(value)):
            raise self.error(field, f"must be a list of texts{'' if may_be_empty else ' that are not empty'}")
        if len(value) != count if count is not None else len(value) < 2:
            raise self.error(
                field, f"has {len(value)} entries, must have {count if count is not None else 'two or more'}"
            )
        return tuple(self._unicode(field, each) for each in value)

    def _unicode(self, field: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(field, f"is not Unicode ({error.reason} at character {error.start})") from error
        return text

    def index(self, field: str, count: int) -> int:
        """A whole number from 0 to count - 1, possibly written as a text."""
        value = self.get(field)
        if isinstance(value, str) and len(value) == 1 and value in "0123456789":
            value = int(value)
        if isinstance(value, int) and is_whole(value) and 0 <= value < count:
            return value
        hint = "; files without answers, as of test sets, cannot be scored" if value in ("", -1, None) else ""
        raise self.error(field, f"must be a whole number from 0 to {count - 1}{hint}")

    def records(self, field: str) -> list[Record]:
        """A list of objects, two at least."""
        value = self.get(field)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, dict) for each in value):
            raise self.error(field, "must be a list of objects, two or more")
        return [Record(each, self.place, f"{self._prefix}{field}.{i}.") for i, each in enumerate(value)]

    def record(self, field: str) -> Record:
        """An object within this one."""
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.error(field, "must be an object")
        return Record(value, self.place, f"{self._prefix}{field}.")


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines, possibly compressed; blank lines are skipped."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix("\ufeff") if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{place}: is not JSON ({error}); there must be one object on each line") from error
            if not isinstance(values, dict):
                raise ConfigError(f"{place}: {shown(values)}: must be an object, with a field for each part of an item")
            yield Record(values, place)


def find_file(path: Path, names: Sequence[str], task: str) -> Path:
    """The file that a task reads: `path` itself, or the first of the names that is in the folder `path`.

    Args:
      names: relative to the folder; patterns such as `*.jsonl` match if they match one file.

    Raises:
      ConfigError: there is no such file or folder, none of the names in it, or several files match.
    """
    if path.is_file():
        return path
    listed = ", ".join(names)
    if not path.is_dir():
        raise ConfigError(f"tasks: {task} = {str(path)!r}: no such file or folder; give a file, or one with {listed}")
    found = find_in_folder(path, names, task)
    if found is None:
        raise ConfigError(f"tasks: {task} = {str(path)!r}: the folder holds none of {listed}; name the file")
    return found


def find_in_folder(folder: Path, names: Sequence[str], task: str) -> Path | None:
    """As `find_file`; None if `folder` is no folder or holds no such file."""
    for name in names:
        for ending in ("", *COMPRESSED):
            found = sorted(folder.glob(name + ending)) if folder.is_dir() else []
            if len(found) > 1:
                several = ", ".join(file.name for file in found[:4])
                raise ConfigError(f"tasks: {task} = {str(folder)!r}: holds several files ({several}); name the one")
            if found:
                return found[0]
    return None
