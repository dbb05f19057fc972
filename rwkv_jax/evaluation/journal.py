"""Results of items on disk, so that an evaluation that was interrupted goes on where it was.

Each task has a file of JSON lines. The first one says what the results are of: the model, the tokenizer and all that
changes them. Each other line holds the results of one item and a digest of the line; it is written at once and never
changed, and a line that is not whole, as after a power failure, counts as not written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.atomic import flush_to_disk, replace_file
from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.evaluation.requests import Loglikelihood, LoglikelihoodResult, Request, Result
from rwkv_jax.json_object import is_unchanged, parse_object, with_digest
from rwkv_jax.run_lock import take_lock

FORMAT = "rwkv-jax evaluation 2"
"""Of the files; those of another format are refused."""

FOLDER = "journal"
"""Where the files lie in an evaluation's folder."""

_SHORT = 60  # characters of a value in a message


class Journal:
    """The results of one task's items."""

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: Mapping[int, str]) -> None:
        """Reads the file if there is one, else begins it.

        Args:
          settings: all that results depend on, as JSON.
          prompts: for each item the hash of its requests (`hash_requests`).

        Raises:
          ConfigError: the file is of other settings or prompts, all differences named; or it is no journal, or cannot
            be written.
        """
        self.path, self._prompts = path, prompts
        self.results: dict[int, list[Result]] = {}
        """Of each item that is done."""
        self.num_truncated: dict[int, int] = {}
        """Of each, contexts whose beginning was left out."""
        whole = [_line(with_digest({"format": FORMAT, **settings}))]
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
            if lines:
                _check_header(path, lines[0], settings)
                whole += self._read(lines[1:])
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != b"".join(whole):
                replace_file(path, b"".join(whole))  # without what is not whole
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(f"output: {path} cannot be written ({error.strerror}); name another folder") from error

    def add(self, item: int, results: Sequence[Result], num_truncated: int = 0) -> None:
        """Writes the results of an item. Raises ConfigError if it cannot, as on a full disk."""
        self.results[item], self.num_truncated[item] = list(results), num_truncated
        try:
            self._file.write(self._item_line(item))
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"output: {self.path} cannot be written ({error.strerror}); make room, then the same command goes on"
            ) from error

    def close(self) -> None:
        """Flushes the file to the disk and closes it."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                flush_to_disk(self._file)
            with contextlib.suppress(OSError):  # of a line that `add` has refused already
                self._file.close()

    def _item_line(self, item: int) -> bytes:
        content = {"item": item, "prompt": self._prompts[item], "num_truncated": self.num_truncated[item]}
        return _line(with_digest({**content, "results": self.results[item]}))

    def _read(self, lines: Sequence[bytes]) -> list[bytes]:
        """The lines that are whole, those of items that are not asked about included."""
        whole = []
        for number, line in enumerate(lines, start=2):
            try:
                content = parse_object(line, self.path)
                if not is_unchanged(content, required=True):
                    continue
            except ConfigError:
                continue
            whole.append(line + b"\n")
            item = content["item"]
            if item not in self._prompts:
                continue  # beyond a smaller --limit
            if content["prompt"] != self._prompts[item]:
                raise ConfigError(
                    f"output: {self.path}, line {number}: item {item} was asked otherwise: the task's file has changed "
                    f"since, or the examples; name another folder, or move {self.path} away"
                )
            self.num_truncated[item] = content["num_truncated"]
            self.results[item] = [
                LoglikelihoodResult(*result) if isinstance(result, list) else result for result in content["results"]
            ]
        return whole


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds an evaluation's folder, which it creates. Raises ConfigError if another process does, or it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock, _ = take_lock(folder / ".lock", wait=0)
    except TimeoutError:
        raise ConfigError(
            f"output = {str(folder)!r}: another process evaluates there; wait until it has ended, or name another"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"output = {str(folder)!r}: cannot be written ({error.strerror}); name another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_folder(folder: Path, tasks: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> None:
    """Refuses a folder that has results of something else, before anything is written there.

    Args:
      tasks: settings of each task that is evaluated, as of `Journal`.
      shared: those that are the same for all tasks in the folder.

    Raises:
      ConfigError: as `Journal`, for the journal of any task.
    """
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        try:
            with path.open("rb") as file:
                line = file.readline()
        except OSError as error:
            raise ConfigError(f"output: {path} cannot be read ({error.strerror}); name another folder") from error
        if line:
            _check_header(path, line, tasks.get(path.stem, shared), is_all=path.stem in tasks)


def refuse_other(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ConfigError if a file's settings are not those that are wanted, all differences named."""
    differences = [
        f"{name} was {_brief(there.get(name))} and is {_brief(wanted.get(name))}"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        remedy = f"name another folder, or move {path} away"
        raise ConfigError(f"output: {path} is of another evaluation: {'; '.join(differences)}; {remedy}")


def hash_requests(requests: Sequence[Request]) -> str:
    """SHA-256 in hex of requests: their kinds, texts and limits."""
    return hashlib.sha256(json.dumps([_plain(request) for request in requests]).encode()).hexdigest()


def _plain(request: Request) -> list[Any]:
    kind = type(request).__name__
    return (
        [kind, request.context, request.continuation]
        if isinstance(request, Loglikelihood)
        else [kind, *vars(request).values()]
    )


def _check_header(path: Path, line: bytes, settings: Mapping[str, Any], *, is_all: bool = True) -> None:
    """Refuses a journal by its first line, whose settings these must be, or where not `is_all`, be among."""
    remedy = f"name another folder, or move {path} away"
    header = parse_object(line, path, remedy=remedy)
    if header.get("format") != FORMAT or not is_unchanged(header, required=True):
        raise ConfigError(f"output: {path} is no journal of this version, or is damaged; {remedy}")
    there = {name: header[name] for name in header if name in settings or (is_all and name not in ("format", "digest"))}
    refuse_other(path, there, json.loads(json.dumps(settings)))


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _brief(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
