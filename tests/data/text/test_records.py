"""JSON records: in lines, in arrays, one after the other, alone and in folders, and what is said of others."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.text import records as records_module
from rwkv_jax.data.text.records import read_records
from rwkv_jax.data.text.sources import read_documents
from rwkv_jax.data.tokenize import tokenize
from rwkv_jax.data.tokenizers import ByteTokenizer
from tests.data.corpora import quiet

_TEXTS = ["first", 'second\n"]}[{', "中文 \U0001f600"]
_RECORDS = [{"text": text, "number": number} for number, text in enumerate(_TEXTS)]
_LINES = "".join(json.dumps(record) + "\n" for record in _RECORDS)
_FORMS = {
    "lines": _LINES,
    "lines of UTF-8": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _RECORDS),
    "array": json.dumps(_RECORDS),
    "array over lines": json.dumps(_RECORDS, indent=2) + "\n",
    "one after the other": "\n".join(json.dumps(record, indent=2) for record in _RECORDS),
    "with a mark": "\ufeff" + _LINES,
}


def _texts(source: Path, **fields: Any) -> list[str]:
    return [document.text for document in read_documents(DataConfig(source=str(source), **fields))]


@pytest.mark.parametrize("form", _FORMS)
def test_a_json_is_read_by_its_records_in_any_form(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.json").write_text(_FORMS[form], encoding="utf-8")
    assert _texts(tmp_path / "a.json") == _TEXTS


def test_one_object_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(_RECORDS[1], indent=2))
    assert _texts(tmp_path / "a.json") == _TEXTS[1:2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json"])
def test_lines_are_read_under_all_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(_LINES)
    assert _texts(tmp_path / name) == _TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_records_in_other_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_text(_FORMS["lines of UTF-8"], encoding=encoding)
    assert _texts(tmp_path / name) == _TEXTS


def test_a_folder_of_records_is_never_trained_on_as_json(tmp_path: Path) -> None:
    (tmp_path / "00.jsonl").write_text(json.dumps(_RECORDS[0]))
    (tmp_path / "01.jsonl.gz").write_bytes(gzip.compress(json.dumps(_RECORDS[1]).encode()))
    (tmp_path / "02.json").write_text(json.dumps(_RECORDS[2:]))
    assert _texts(tmp_path) == _TEXTS


def test_tokenize_and_mixtures_read_records(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(_LINES)
    made = tokenize(DataConfig(source=str(tmp_path / "a")), ByteTokenizer(257), tmp_path / "out", quiet)
    assert made.num_documents == len(_TEXTS)
    assert made.num_tokens == sum(len(text.encode()) + 1 for text in _TEXTS)
    mixture = ((str(tmp_path / "a"), 0.5), (str(tmp_path / "b"), 0.5))
    data = DataConfig(mixture=mixture, tokenizer="bytes", held_out=0, cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, 257, quiet)
    assert [source.num_documents for source in corpus.sources] == [3, 3]
    assert [source.num_bytes for source in corpus.sources] == [sum(len(text.encode()) for text in _TEXTS)] * 2


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_records_beside_other_files_are_refused(tmp_path: Path, name: str) -> None:
    content = _LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "README.md").write_text("about")
    expected = f"has records or tables, as {name}, and other files, the first is README.md; choose .* '**/*{name[1:]}'"
    with pytest.raises(ConfigError, match=re.escape(expected).replace(r"\ \.\*\ ", ".*")):
        _texts(tmp_path)
    assert _texts(tmp_path, glob=f"*{name[1:]}") == _TEXTS
    assert _texts(tmp_path, glob="*.md") == ["about"]


def test_a_json_without_text_beside_records_is_named(tmp_path: Path) -> None:
    """As `datasets` leaves them beside its tables."""
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "x.jsonl").write_text(_LINES)
    expected = (
        "as x.jsonl, and other files, the first is dataset_info.json, without text in a field 'text'; choose the one "
        "or the other with data.glob, e.g. '**/*.jsonl'"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        _texts(tmp_path)
    (tmp_path / "x.jsonl").rename(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"as x.json, and other files, .* e.g. 'x.json'$"):
        _texts(tmp_path)


@pytest.mark.parametrize("content", ['{"name": "a package"}', '[{"text": 3}]', "[1, 2]", "{", ""])
def test_settings_in_a_tree_of_code_stay_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "main.py").write_text("import json")
    (tmp_path / "settings.json").write_text(content)
    assert _texts(tmp_path) == ["import json"] + [content] * bool(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"body": ""}]', "line 2 has no field 'text'; set data.text_field to one of ['body']"),
        ('{"data": []}', "line 1 has no field 'text'; set data.text_field to one of ['data']"),
        ('[{"text": "a"}\n, 3]', "line 2 is not a JSON object but int"),
        ('[{"text": null}]', "line 1: field 'text' is not a string but NoneType"),
        ('[{"text": "a\\ud800"}]', "line 1: field 'text' has half a surrogate pair at character 1"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2 is not JSON in UTF-8 (no comma before '{')"),
        ('[{"text": "a"},\n\n{"text": b}]', "line 3 is not JSON in UTF-8 (Expecting value"),
        ('[{"text": "a"}, ]', "line 1 is not JSON in UTF-8 (Expecting value"),
        ('[{"text": "a"},\n{"text": "b', "line 2 is not JSON in UTF-8 (Unterminated string"),
        ('[{"text": "a"}\n', "line 2 is not JSON in UTF-8 (the array has no end)"),
        ('[{"text": "a"}]\n[', "line 2 is not JSON in UTF-8 ('[' follows the array)"),
        ('{"text": "a"}\n]', "line 2 is not JSON in UTF-8 (Expecting value"),
        ("a text", "line 1 is not JSON in UTF-8 (Expecting value"),
        ("[" * 100_000, "line 1 is not JSON in UTF-8 ("),
        (b'[{"text": "a"},\n{"text": "\xe9"}]', "line 2 is not JSON in UTF-8 (the byte b'\\xe9' is not UTF-8)"),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content.encode() if isinstance(content, str) else content)
    for source in (tmp_path / "x.json", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            _texts(source)
        assert str(caught.value).startswith(f"data.source = {str(source)!r}: ")
        assert "x.json" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", " \n", "", '[{"text": ""}]'])
def test_no_text_at_all_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="no record has text in its field 'text'"):
        _texts(tmp_path / "x.json")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), _VALUES), max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_array_is_read_wherever_reading_stops_between(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[tuple[str, object]],
    indent: int | None,
    is_array: bool,
    characters: int,
) -> None:
    made = [{"other": other, "text": text} for text, other in items]
    whole = json.dumps(made, indent=indent) if is_array else "\n".join(json.dumps(one, indent=indent) for one in made)
    path = tmp_path_factory.mktemp("records") / "x.json"
    path.write_text(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_READ_CHARACTERS", characters)
        assert list(read_records(path, "text")) == [text for text, _ in items]
