"""Reads documents from the standard library, text files, folders, JSON records and tables."""

from __future__ import annotations

import contextlib
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.text import records, tables
from rwkv_jax.data.text.files import (
    COMPRESSED,
    NotTextError,
    explain_refusal,
    inner_suffix,
    read_text,
    refuse_wrong_file,
)
from rwkv_jax.data.text.split import Document
from rwkv_jax.file_kinds import Kind, describe_wrong_file

PYTHON_STDLIB = "python-stdlib"

# Not every distribution ships these trees; excluded so that the corpus is the same on all machines.
_STDLIB_SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Generated when the interpreter is built: they contain paths and compiler flags of one machine.
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")

_WANTED = (
    f"a text file, a folder, a file of JSON records ({', '.join(records.SUFFIXES)}), each perhaps compressed "
    f"({', '.join(COMPRESSED)}), a table ({', '.join(tables.SUFFIXES)}), tokens (.bin and .idx), or {PYTHON_STDLIB!r}"
)


def read_documents(data: DataConfig, report: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Documents of `data.source`, ordered by name (records and rows in their own order).

    One document is in memory at a time. Newlines are not translated and no document is empty. Hidden, empty and
    non-text files of a folder are skipped, and `report` gets their number. A folder may contain records and tables
    instead. Raises ConfigError for a source that is missing, empty, not UTF-8 or malformed.
    """
    path = Path(data.source).expanduser()
    root, names = _find_files(data, path)
    with _named(data, path):
        if _are_records(root, names, data):
            yield from _read_records(root, names, data)
        elif root == path or data.source == PYTHON_STDLIB:
            yield from _read_folder(root, names, data, report)
        else:
            yield _read_file(path)


def read_source_records(
    data: DataConfig, subject: str, report: Callable[[str], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each record of `data.source`: JSON, or rows of tables, in a file or a folder.

    Other files of a folder are left out, and `report` gets their number. `subject` says in errors what the records are
    of, such as chats. Raises ConfigError for a source that is missing, without records or malformed.
    """
    path = Path(data.source).expanduser()
    root, names = _find_files(data, path)
    chosen = [name for name in names if records.has_records(name) or tables.is_table(name)]
    with _named(data, path):
        if not chosen:
            kinds = ", ".join((*records.SUFFIXES, *tables.SUFFIXES))
            raise ConfigError(f"data.source = {data.source!r}: has no records of {subject}; give files of {kinds}")
        if len(chosen) < len(names) and report is not None:
            report(f"left out {len(names) - len(chosen)} of {len(names)} files that hold no records")
        for name in chosen:
            is_table = tables.is_table(name)
            with explain_refusal(root / name, f"records of {subject}", ("parquet" if is_table else "json", "text")):
                yield from (tables.read_rows if is_table else records.read_objects)(root / name)


def _find_files(data: DataConfig, path: Path) -> tuple[Path, list[str]]:
    """The folder and the names, sorted, of the files of a source. Raises ConfigError if there are none."""
    if data.source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        names = _list_stdlib(root)
    elif path.is_dir():
        root, names = path, _list_folder(path, data)
    elif path.exists():
        root, names = path.parent, [path.name]
    else:
        wrong = describe_wrong_file(data.source, _WANTED)  # a URL
        raise _source_error(
            data, wrong or f"there is no such file or folder (looked for {path.absolute()}); give the path of {_WANTED}"
        )
    return root, sorted(names)


def _source_error(data: DataConfig, remedy: str) -> ConfigError:
    return ConfigError(f"data.source = {data.source!r}: {remedy}")


@contextlib.contextmanager
def _named(data: DataConfig, path: Path) -> Iterator[None]:
    """Puts `data.source` first in errors about its files."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if message.startswith("data."):
            raise
        raise _source_error(data, message.removeprefix(f"{path}: ")) from error


def _list_stdlib(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [
        path.as_posix()
        for path in paths
        if _STDLIB_SKIPPED_PARTS.isdisjoint(path.parts)
        and not any(part.startswith(_STDLIB_SKIPPED_PREFIXES) for part in path.parts)
    ]


def _list_folder(root: Path, data: DataConfig) -> list[str]:
    cache = Path(data.cache_dir).expanduser().resolve()
    try:
        matches = [path for path in root.glob(data.glob) if path.is_file()]
        names = {path.relative_to(root).as_posix(): path for path in matches}
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"data.glob = {data.glob!r}: not a pattern relative to the folder {data.source!r} ({error}); "
            "'**/*' is every file, '**/*.txt' every text file"
        ) from error
    return [
        name
        for name, path in names.items()
        # Do not read a cache inside the source as text.
        if not any(part.startswith(".") for part in PurePosixPath(name).parts) and cache not in path.resolve().parents
    ]


def _are_records(root: Path, names: Sequence[str], data: DataConfig) -> bool:
    """Whether files are read as records, by their suffixes. Raises ConfigError for records mixed with other files.

    A .json among other files is treated as text, as in a source tree, unless its first record has a text field.
    """
    of_records = [name for name in names if records.has_records(name) or tables.is_table(name)]
    if len(names) == 1:
        return bool(of_records)
    chosen = [
        name
        for name in of_records
        if inner_suffix(name) != ".json" or records.first_record_has_text(root / name, data.text_field)
    ]
    others = sorted(set(names) - set(chosen))
    if not chosen or not others:
        return len(of_records) == len(names) > 0  # if no .json has a text, reading the first raises
    first, other = chosen[0], others[0]
    endings = {
        name: "".join(PurePosixPath(name).suffixes[-2 if name.lower().endswith(COMPRESSED) else -1 :])
        for name in (first, other)
    }
    has_no_text = f", without text in a field {data.text_field!r}" if other in of_records else ""
    example = first if endings[first] == endings[other] else f"**/*{endings[first]}"
    raise _source_error(
        data,
        f"has records or tables, as {first}, and other files, the first is {other}{has_no_text}; choose the one or the "
        f"other with data.glob, e.g. {example!r}",
    )


def _read_records(root: Path, names: Sequence[str], data: DataConfig) -> Iterator[Document]:
    found = 0
    for name in names:
        path = root / name
        read, kind = (tables.read_table, "parquet") if tables.is_table(name) else (records.read_records, "json")
        with explain_refusal(path, f"a corpus, or leave it out with data.glob: {_WANTED}", (kind, "text")):
            for text in read(path, data.text_field):
                if text:
                    found += 1
                    # Named by its text, so that copies of a text are never split between training and held-out.
                    yield Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text)
    if not found:
        raise _source_error(data, f"no record has text in its field {data.text_field!r}")


def _read_file(path: Path) -> Document:
    with explain_refusal(path, _WANTED, ("text", "json")):
        text = read_text(path)
    if not text:
        raise ConfigError(f"{path}: the file is empty")
    refuse_wrong_file(path, _WANTED, ("text", "json"))
    return Document(path.name, text)


def _read_folder(
    root: Path, names: Sequence[str], data: DataConfig, report: Callable[[str], None] | None
) -> Iterator[Document]:
    if not names:
        raise _source_error(
            data, f"no file in {root} matches data.glob = {data.glob!r} (hidden files do not count); change one of them"
        )
    found, not_text = 0, []
    for name in names:
        path = root / name
        try:
            text = read_text(path)
        except NotTextError:
            # In the standard library, only files of the test trees declare an encoding other than UTF-8.
            not_text.append(name)
            continue
        if text:
            _refuse_failed_download(path)
            found += 1
            yield Document(name, text)
    if not found:
        raise _source_error(
            data,
            f"none of the {len(names)} files in {root} holds UTF-8 text "
            f"({len(not_text)} not UTF-8, {len(names) - len(not_text)} empty)",
        )
    if not_text and report is not None:
        report(f"left out {len(not_text)} of {len(names)} files that are not UTF-8, the first is {not_text[0]}")


def _refuse_failed_download(path: Path) -> None:
    """Raises ConfigError for an LFS pointer, web page or error saved as text; code may start like the latter two."""
    suffix = inner_suffix(path.name)
    if suffix not in (".json", ".xml"):
        reads: tuple[Kind, ...] = ("text", "json") if suffix in ("", ".txt") else ("text", "json", "html", "other")
        refuse_wrong_file(path, "a file of text, or leave it out with data.glob", reads)
