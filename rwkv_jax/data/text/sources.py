"""Documents from the standard library, text files, folders, JSON lines and tables, and their split into two sides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.text.tables import SUFFIXES, is_table, read_table

PYTHON_STDLIB = "python-stdlib"

# Distributions differ in whether they ship these trees, so a corpus with them would differ from machine to machine.
_STDLIB_SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Written by the build of the interpreter: they hold the paths and compiler flags of one machine.
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")

# Any salt gives a valid split. A share of 5% of the standard library's files is 2% to 7% of its bytes, depending on
# the salt; with this one, 2%, 5%, 10% and 20% of the files are within a tenth of the same share of the bytes.
_SPLIT_SALT = b"3"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, named by its path inside the source (by a digest of the text, for a record or row)."""

    name: str
    text: str


def read_documents(data: DataConfig, report: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Documents of `data.source` in an order that depends on their names alone (on the order of records and rows).

    One document is in memory at a time. No newline is translated and no document is empty. Files of a folder that
    are hidden, empty or not UTF-8 are left out, and `report` is told how many. A folder may hold tables instead.
    Raises ConfigError for a source that is missing, empty, not UTF-8 or malformed.
    """
    if data.source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from _read_files(root, _list_stdlib(root), data, report)
        return
    path = Path(data.source).expanduser()
    if path.is_dir():
        names = _list_folder(path, data)
        if any(map(is_table, names)):
            yield from _read_tables(path, names, data)
        else:
            yield from _read_files(path, names, data, report)
    elif not path.exists():
        raise _source_error(
            data,
            f"there is no such file or folder (looked for {path.absolute()}); give the path of a text file, "
            f"a folder, a .jsonl file, a table ({', '.join(SUFFIXES)}) or tokens (.bin and .idx), or {PYTHON_STDLIB!r}",
        )
    elif path.suffix == ".jsonl":
        yield from _read_json_lines(path, data)
    elif is_table(path.name):
        yield from _read_tables(path.parent, [path.name], data)
    else:
        yield _read_text_file(path, data)


def choose_held_out(names: Iterable[str], share: float) -> frozenset[str]:
    """Those of two or more distinct names that are held out: about `share` of them, at least one, never all.

    Each name decides for itself by a hash, so a document that is added or removed moves no other one, unless a side
    would be left empty. Raises ConfigError where all names are the same.
    """
    places = {name: _place(name) for name in names}
    if len(places) < 2:
        raise ConfigError(
            f"data.held_out = {share}: the source has {len(places)} distinct document(s), and two are needed to hold "
            "one out; add documents, or give the text as one file, which is split at a line"
        )
    chosen = {name for name, place in places.items() if place < share}
    if not chosen:
        chosen = {min(places, key=places.__getitem__)}
    elif len(chosen) == len(places):
        chosen.remove(max(places, key=places.__getitem__))
    return frozenset(chosen)


def split_document(document: Document, share: float) -> tuple[Document, Document]:
    """One document cut at the line boundary that leaves about the last `share` of its UTF-8 bytes held out.

    Raises ConfigError where no line boundary leaves text on both sides.
    """
    content = document.text.encode()
    target = min(max(round(len(content) * (1 - share)), 1), len(content) - 1)
    # A newline is one byte in UTF-8 and never part of another character, so every cut leaves two valid texts.
    before, after = content.rfind(b"\n", 0, target) + 1, content.find(b"\n", target - 1) + 1
    cuts = [cut for cut in (before, after) if 0 < cut < len(content)]
    if not cuts:
        raise ConfigError(
            f"data.held_out = {share}: {document.name} has {len(content)} bytes without a line break that leaves text "
            "on both sides, so nothing can be held out; add lines, or give a folder of several files"
        )
    cut = min(cuts, key=lambda position: abs(position - target))
    return (
        Document(document.name, content[:cut].decode()),
        Document(document.name, content[cut:].decode()),
    )


def _place(name: str) -> float:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, salt=_SPLIT_SALT).digest()
    return int.from_bytes(digest, "big") / 2**64


def _source_error(data: DataConfig, remedy: str) -> ConfigError:
    return ConfigError(f"data.source = {data.source!r}: {remedy}")


def _read_bytes(path: Path, data: DataConfig) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _source_error(data, f"cannot read {path}: {error.strerror}") from error


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
        # A cache inside the source would become part of the next corpus.
        if not any(part.startswith(".") for part in PurePosixPath(name).parts) and cache not in path.resolve().parents
    ]


def _read_files(
    root: Path, names: list[str], data: DataConfig, report: Callable[[str], None] | None
) -> Iterator[Document]:
    if not names:
        raise _source_error(
            data, f"no file in {root} matches data.glob = {data.glob!r} (hidden files do not count); change one of them"
        )
    found, not_utf8 = 0, []
    for name in sorted(names):
        content = _read_bytes(root / name, data)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            # In the standard library, only files of the test trees declare an encoding other than UTF-8.
            not_utf8.append(name)
            continue
        if text:
            found += 1
            yield Document(name, text)
    if not found:
        raise _source_error(
            data,
            f"none of the {len(names)} files in {root} holds UTF-8 text "
            f"({len(not_utf8)} not UTF-8, {len(names) - len(not_utf8)} empty)",
        )
    if not_utf8 and report is not None:
        report(f"left out {len(not_utf8)} of {len(names)} files that are not UTF-8, the first is {not_utf8[0]}")


def _read_text_file(path: Path, data: DataConfig) -> Document:
    content = _read_bytes(path, data)
    if not content:
        raise _source_error(data, "the file is empty")
    try:
        return Document(path.name, content.decode())
    except UnicodeDecodeError as error:
        raise _source_error(
            data, f"not UTF-8 at byte {error.start}; convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error


def _read_json_lines(path: Path, data: DataConfig) -> Iterator[Document]:
    found = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = _record_text(line, number, data) if line.strip() else ""
                if text:
                    found += 1
                    yield _document_of_text(text)
    except OSError as error:
        raise _source_error(data, f"cannot read {path}: {error.strerror}") from error
    if not found:
        raise _source_error(data, f"no record has text in its field {data.text_field!r}")


def _read_tables(root: Path, names: list[str], data: DataConfig) -> Iterator[Document]:
    others = [name for name in sorted(names) if not is_table(name)]
    if others:
        raise _source_error(
            data,
            f"has tables and other files, the first is {others[0]}; choose the one or the other with data.glob, "
            f"e.g. '**/*.{next(name for name in sorted(names) if is_table(name)).rpartition('.')[2]}'",
        )
    found = 0
    for name in sorted(names):
        for text in read_table(root / name, data.text_field):
            if text:
                found += 1
                yield _document_of_text(text)
    if not found:
        raise _source_error(data, f"no row has text in its column {data.text_field!r}")


def _document_of_text(text: str) -> Document:
    """Named by its text, so that copies of one text never stand on both sides of the split."""
    return Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text)


def _record_text(line: bytes, number: int, data: DataConfig) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _source_error(data, f"line {number} is not JSON in UTF-8 ({error}); mend or remove it") from error
    if not isinstance(record, dict):
        raise _source_error(data, f"line {number} is not a JSON object but {type(record).__name__}; mend or remove it")
    if data.text_field not in record:
        raise _source_error(
            data,
            f"line {number} has no field {data.text_field!r}; set data.text_field to one of {sorted(record)}",
        )
    text = record[data.text_field]
    if not isinstance(text, str):
        raise _source_error(data, f"line {number}: field {data.text_field!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _source_error(
            data, f"line {number}: field {data.text_field!r} has half a surrogate pair at character {error.start}"
        ) from error
    return text
