"""Text becomes official token files that train like the text, by function and by command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax import cli
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenize import tokenize
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer
from tests.data.corpora import flat, idx_bytes, quiet, write_pair

_TEXTS = ["first text", "second\n\ntext ", "third, a café"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three records."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in _TEXTS))
    return path


def _run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rwkv", *arguments])
    cli.main()


def test_each_document_ends_with_end_of_text(source: Path, tmp_path: Path) -> None:
    tokenizer, reports = WorldTokenizer(), list[str]()
    made = tokenize(DataConfig(source=str(source)), tokenizer, tmp_path / "new" / "x", reports.append)
    expected = [[*tokenizer.encode(text), 0] for text in _TEXTS]
    assert (made.bin_path, made.idx_path) == (tmp_path / "new" / "x.bin", tmp_path / "new" / "x.idx")
    assert np.fromfile(made.bin_path, "<u2").tolist() == flat(expected)
    assert made.idx_path.read_bytes() == idx_bytes([len(document) for document in expected])
    assert (made.num_tokens, made.num_documents) == (sum(map(len, expected)), 3)
    assert reports == []


def test_what_is_written_can_be_trained_on(source: Path, tmp_path: Path) -> None:
    made = tokenize(DataConfig(source=str(source)), ByteTokenizer(257), tmp_path / "x", quiet)
    data = DataConfig(source=str(made.bin_path), tokenizer="bytes", held_out=0.4)
    corpus = prepare_corpus(data, 257, quiet)
    assert corpus.held_out_bytes() == _TEXTS[2].encode()
    assert corpus.train.num_bytes == sum(len(text.encode()) for text in _TEXTS[:2])


def test_texts_that_do_not_come_back_are_counted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, reports = WorldTokenizer(), list[str]()
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: decode(tokens).replace("é", "e"))
    tokenize(DataConfig(source=str(source)), tokenizer, tmp_path / "x", reports.append)
    assert reports == ["the tokenizer changes the text of 1 of 3 documents, as by normalization"]


def test_tokens_are_not_tokenized_again(tmp_path: Path) -> None:
    path = write_pair(tmp_path / "x", [[5, 0]])
    with pytest.raises(ConfigError, match=r"data.source = .*: holds tokens already; name a source of text"):
        tokenize(DataConfig(source=str(path)), WorldTokenizer(), tmp_path / "y", quiet)


def test_a_source_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("\n{")
    with pytest.raises(ConfigError, match="line 4 is not JSON"):
        tokenize(DataConfig(source=str(source)), WorldTokenizer(), tmp_path / "out" / "x", quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_prints_what_the_official_script_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("x" * 6143)
    arguments = ["tokenize", str(tmp_path), str(tmp_path / "out" / "x"), "--tokenizer", "bytes", "--vocab-size", "257"]
    _run([*arguments, "--glob", "*.txt"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path / 'out' / 'x.bin'} and x.idx: 6144 tokens, 1 documents",
        "magic prime for sequences of 512: 11",
    ]
    with pytest.raises(SystemExit, match=r"rwkv: .*x\.bin: exists already and is not overwritten; move it away"):
        _run(arguments, monkeypatch)
    (tmp_path / "b.jsonl").write_text('{"body": "text"}')
    with pytest.raises(SystemExit, match=r"rwkv: source = .*b.jsonl': line 1 has no field 'text'; set --text-field to"):
        _run([*arguments[:1], str(tmp_path / "b.jsonl"), str(tmp_path / "y"), *arguments[3:]], monkeypatch)
    with pytest.raises(SystemExit, match=r"rwkv: --tokenizer 'bytes': does not match"):
        _run([*arguments[:-1], "65536"], monkeypatch)


@pytest.mark.long
def test_the_installed_command_tokenizes_the_standard_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from rwkv_jax.cli import main; main()", "tokenize", "python-stdlib"]
    done = subprocess.run([*command, str(tmp_path / "x"), "--tokenizer", "world"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "magic prime for sequences of 512: " in done.stdout
    corpus = prepare_corpus(DataConfig(source=str(tmp_path / "x"), tokenizer="world"), 65536, quiet)
    assert corpus.train.num_bytes > 8e6
