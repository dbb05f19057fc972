"""Which documents a source gives, in which order, and what is said when it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.text.sources import read_documents
from rwkv_jax.data.text.split import Document


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _read(source: Path, **fields: Any) -> list[Document]:
    return list(read_documents(DataConfig(source=str(source), **fields)))


def test_standard_library_is_sorted_and_without_tests() -> None:
    names = [document.name for document in read_documents(DataConfig())]
    assert names == sorted(names)
    assert len(names) > 400
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_text_file_keeps_every_character(tmp_path: Path) -> None:
    _write(tmp_path, {"book.txt": "one\r\ntwo\rthree\u2028\ttab  \n".encode()})
    assert _read(tmp_path / "book.txt") == [Document("book.txt", "one\r\ntwo\rthree\u2028\ttab  \n")]


def test_folder_is_in_the_order_of_its_names_not_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, {name: name.encode() for name in ("b.txt", "a/z.txt", "B.txt", "a-1.txt", "ä.txt", "c/d/e.txt")})
    expected = ["B.txt", "a-1.txt", "a/z.txt", "b.txt", "c/d/e.txt", "ä.txt"]
    assert [document.name for document in _read(tmp_path)] == expected
    listed = list(tmp_path.glob("**/*"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(listed[::-1]))
    assert [document.name for document in _read(tmp_path)] == expected


def test_folder_leaves_out_hidden_empty_and_binary_files_and_its_own_cache(tmp_path: Path) -> None:
    files = {"good.txt": b"good", "empty.txt": b"", "binary.bin": b"\xff\xfe\x00", "latin.txt": b"caf\xe9"}
    files |= {".hidden": b"hidden", ".git/config": b"hidden", "runs/corpora/x/held_out.txt": b"cache"}
    _write(tmp_path, files)
    lines: list[str] = []
    data = DataConfig(source=str(tmp_path), cache_dir=str(tmp_path / "runs/corpora"))
    assert [document.name for document in read_documents(data, lines.append)] == ["good.txt"]
    assert lines == ["left out 2 of 4 files that are not UTF-8, the first is binary.bin"]


def test_glob_selects_files(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": b"a", "b.md": b"b", "sub/c.txt": b"c"})
    assert [document.name for document in _read(tmp_path, glob="**/*.txt")] == ["a.txt", "sub/c.txt"]
    assert [document.name for document in _read(tmp_path, glob="*.txt")] == ["a.txt"]


def test_json_lines_are_read_in_order_and_copies_share_a_name(tmp_path: Path) -> None:
    records = [{"text": "first"}, {"text": "second\nline"}, {"text": ""}, {"text": "first"}]
    content = "\n".join(json.dumps(record) for record in records) + "\n\n"
    documents = _read(_write(tmp_path, {"x.jsonl": content.encode()}) / "x.jsonl")
    assert [document.text for document in documents] == ["first", "second\nline", "first"]
    assert documents[0].name == documents[2].name != documents[1].name


def test_json_lines_take_the_named_field(tmp_path: Path) -> None:
    _write(tmp_path, {"x.jsonl": b'{"content": "text", "text": 5}\n'})
    assert _read(tmp_path / "x.jsonl", text_field="content")[0].text == "text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON in UTF-8"),
        (b'{"text": "\xff"}', "line 2 is not JSON in UTF-8"),
        (b'["text"]', "line 2 is not a JSON object but list"),
        (b'{"b": "", "a": ""}', "line 2 has no field 'text'; set data.text_field to one of ['a', 'b']"),
        (b'{"text": null}', "line 2: field 'text' is not a string but NoneType"),
        (b'{"text": "a\\ud800"}', "line 2: field 'text' has half a surrogate pair at character 1"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    _write(tmp_path, {"x.jsonl": b'{"text": "good"}\n' + line + b"\n"})
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        _read(tmp_path / "x.jsonl")
    assert "x.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "source", "fields", "message"),
    [
        ({}, "nowhere", {}, "there is no such file or folder"),
        ({}, ".", {}, "no file in"),
        ({"a.txt": b"a"}, ".", {"glob": "*.py"}, "matches data.glob = '*.py'"),
        ({"a.txt": b"a"}, ".", {"glob": "/etc/*"}, "not a pattern relative to the folder"),
        ({"a.txt": b"a"}, ".", {"glob": ""}, "not a pattern relative to the folder"),
        ({"a.txt": b"", "b.bin": b"\xff"}, ".", {}, "(1 not UTF-8, 1 empty)"),
        ({"a.txt": b""}, "a.txt", {}, "the file is empty"),
        ({"a.txt": b"ab\xff"}, "a.txt", {}, "not UTF-8 at byte 2; convert it"),
        ({"a.jsonl": b"\n"}, "a.jsonl", {}, "no record has text in its field 'text'"),
    ],
)
def test_unusable_sources_are_refused(
    tmp_path: Path, files: dict[str, bytes], source: str, fields: dict[str, str], message: str
) -> None:
    _write(tmp_path, files)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        _read(tmp_path / source, **fields)
    assert str(caught.value).startswith("data.")
