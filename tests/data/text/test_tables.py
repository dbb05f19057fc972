"""Texts of Parquet and Arrow files, alone and in folders, and what is said where there are none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather, parquet

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.text import tables as tables_module
from rwkv_jax.data.text.sources import read_documents
from rwkv_jax.data.text.tables import read_table

_TEXTS = ["first", "second\r\nline", "", "café \U0001f600", "first"]


def _parquet(table: pyarrow.Table, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=2)


def _feather(table: pyarrow.Table, path: Path) -> None:
    feather.write_feather(table, str(path))


def _stream(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _file(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


_FORMATS: dict[str, Callable[[pyarrow.Table, Path], None]] = {
    "x.parquet": _parquet,
    "x.feather": _feather,
    "stream.arrow": _stream,
    "file.arrow": _file,
}


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_format_and_type_of_text(tmp_path: Path, name: str, kind: str) -> None:
    types: dict[str, Any] = {
        "string": pyarrow.string(),
        "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    column = pyarrow.array(_TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(types[kind])
    table = pyarrow.table({"number": pyarrow.array(range(5)), "text": column})
    _FORMATS[name](table, tmp_path / name)
    assert list(read_table(tmp_path / name, "text")) == _TEXTS
    documents = list(read_documents(DataConfig(source=str(tmp_path / name))))
    assert [document.text for document in documents] == [text for text in _TEXTS if text]
    assert documents[0].name == documents[3].name != documents[1].name


def test_a_batch_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_BATCH_ROWS", 2)
    _parquet(pyarrow.table({"text": _TEXTS}), tmp_path / "x.parquet")
    sizes = [len(batch) for batch in tables_module._column_batches(tmp_path / "x.parquet", "text")]
    assert sum(sizes) == 5
    assert max(sizes) == 2
    assert list(read_table(tmp_path / "x.parquet", "text")) == _TEXTS


def test_a_folder_of_tables_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _parquet(pyarrow.table({"text": ["second"]}), tmp_path / "b.parquet")
    _feather(pyarrow.table({"text": ["first"]}), tmp_path / "a" / "z.feather")
    data = DataConfig(source=str(tmp_path))
    assert [document.text for document in read_documents(data)] == ["first", "second"]
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(
        ConfigError,
        match=r"tables, as a/z.feather, and other files, .* README.md; .*'\*\*/\*.feather'",
    ):
        list(read_documents(data))
    data = DataConfig(source=str(tmp_path), glob="**/*.parquet")
    assert [document.text for document in read_documents(data)] == ["second"]


def test_another_column(tmp_path: Path) -> None:
    _parquet(pyarrow.table({"text": [1], "content": ["text"]}), tmp_path / "x.parquet")
    data = DataConfig(source=str(tmp_path / "x.parquet"), text_field="content")
    assert [document.text for document in read_documents(data)] == ["text"]


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"b": ["x"], "a": ["y"]}, "has no column 'text'; set data.text_field to one of ['a', 'b']"),
        (
            {"text": [1], "body": ["y"]},
            "column 'text' is not text but int64; set data.text_field to a column of text, such as ['body']",
        ),
        ({"text": [["x"]]}, "column 'text' is not text but list"),
        ({"text": [b"x"]}, "column 'text' is not text but binary"),
        ({"text": ["x", "y", "z", None]}, "row 3 has no text in its column 'text' (null); remove it"),
    ],
)
def test_a_column_that_holds_no_text_is_named(tmp_path: Path, name: str, columns: dict[str, Any], message: str) -> None:
    _FORMATS[name](pyarrow.table(columns), tmp_path / name)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: {message}")):
        list(read_table(tmp_path / name, "text"))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    _file(table, tmp_path / "x.arrow")
    with pytest.raises(ConfigError, match="has several columns 'text'; rename all but one"):
        list(read_table(tmp_path / "x.arrow", "text"))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    latin = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    _stream(pyarrow.table({"text": latin}), tmp_path / "x.arrow")
    with pytest.raises(ConfigError, match=r"row 1, column 'text' is not UTF-8 at byte 3"):
        list(read_table(tmp_path / "x.arrow", "text"))


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
@pytest.mark.parametrize("content", [b"", b"ARROW1\x00\x00", b"PAR1", b"no table, but text of some length\n" * 10])
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read as a table \("):
        list(read_table(tmp_path / name, "text"))


@pytest.mark.parametrize("name", _FORMATS)
def test_a_table_cut_short_is_named(tmp_path: Path, name: str) -> None:
    _FORMATS[name](pyarrow.table({"text": [f"text {number}" * 50 for number in range(300)]}), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"cannot be read as a table \("):
        list(read_table(tmp_path / name, "text"))


def test_a_table_without_text_is_refused(tmp_path: Path) -> None:
    _parquet(pyarrow.table({"text": ["", ""]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"data.source = .*: no record has text in its field 'text'"):
        list(read_documents(DataConfig(source=str(tmp_path / "x.parquet"))))


def test_the_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet(pyarrow.table({"text": ["x"]}), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"x.parquet': needs the package pyarrow: pip install .rwkv-jax\[parquet\]"):
        list(read_documents(DataConfig(source=str(tmp_path / "x.parquet"))))
