"""What is no corpus and no tokenizer is named for what it is, with the remedy, before any work is done."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path

import pytest

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.text.sources import read_documents
from rwkv_jax.data.tokenizers import load_tokenizer
from tests.data.corpora import idx_bytes, quiet, write_pair

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
_ERROR = b'{"error": "Repository not found"}'
_IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
_WRONG = {
    "a Git LFS pointer": (
        _POINTER,
        "is a Git LFS pointer to 123,456 bytes, not the file itself; fetch it: git lfs pull",
    ),
    "a web page": (_PAGE, "is a web page ('Sign in'), saved in place of the file; download the file itself"),
    "an error of a server": (_ERROR, "is the error answer of a server"),
    "an image": (_IMAGE, "is an image (PNG); name "),
    "compressed": (gzip.compress(b"text"), "is compressed (gzip); unpack it and name what was in it"),
    "a download that did not begin": (bytes(5000), "begins with 4096 zeros: the download or copy did not finish"),
}


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl", "x.json", "x.parquet", "x.arrow"])
@pytest.mark.parametrize("what", _WRONG)
def test_what_is_no_corpus_is_named(tmp_path: Path, name: str, what: str) -> None:
    content, message = _WRONG[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        list(read_documents(DataConfig(source=str(tmp_path / name))))
    assert str(caught.value).startswith(f"data.source = {str(tmp_path / name)!r}: ")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize("what", ["a Git LFS pointer", "a web page", "an error of a server"])
def test_a_failed_download_in_a_folder_is_not_trained_on(tmp_path: Path, name: str, what: str) -> None:
    content, message = _WRONG[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data.source = .*{name}: {re.escape(message)}"):
        list(read_documents(DataConfig(source=str(tmp_path))))


def test_code_that_begins_like_a_page_or_an_error_stays_text(tmp_path: Path) -> None:
    files = {"a.php": _PAGE, "b.html": _PAGE, "c.json": _ERROR, "d.xml": b"<?xml?><Error>", "e.py": b"pass"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    texts = [document.text.encode() for document in read_documents(DataConfig(source=str(tmp_path)))]
    assert texts == list(files.values())


def test_a_record_with_a_field_named_message_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"message": "text"}\n')
    data = DataConfig(source=str(tmp_path / "x.jsonl"), text_field="message")
    assert [document.text for document in read_documents(data)] == ["text"]


@pytest.mark.parametrize("url", ["https://example.org/a.txt", "s3://bucket/a.jsonl"])
def test_a_url_is_no_path(url: str) -> None:
    message = "is a web address, not a path; download it, then name a"
    with pytest.raises(ConfigError, match=rf"data.source = '{url}': {message} text file"):
        list(read_documents(DataConfig(source=url)))
    with pytest.raises(ConfigError, match=rf"tokenizer = '.*': {message} sentencepiece model"):
        load_tokenizer(url, 65536)


@pytest.mark.parametrize("what", ["a Git LFS pointer", "a web page", "an error of a server"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_what_is_no_file_of_tokens_is_named(tmp_path: Path, suffix: str, what: str) -> None:
    content, message = _WRONG[what]
    path = write_pair(tmp_path / "x", [[5, 6, 0]])
    wrong = path.with_suffix(suffix)
    wrong.write_bytes(content)
    if suffix == ".bin" and what == "a web page":  # tokens may begin like text
        message = "does not match x.bin"
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare_corpus(DataConfig(source=str(path), tokenizer="bytes"), 257, quiet)


@pytest.mark.parametrize("what", _WRONG)
@pytest.mark.parametrize("name", ["tokenizer.json", "x.model"])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, name: str, what: str) -> None:
    content, message = _WRONG[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: {re.escape(message)}"):
        load_tokenizer(tmp_path / name, 65536)


def test_weights_and_tokens_are_no_tokenizers(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"")
    (tmp_path / "x.idx").write_bytes(idx_bytes([1]))
    (tmp_path / "x.txt").write_text("a text")
    for name, message in {
        "x.pth": "is a file of tensors by torch.save; name a sentencepiece model",
        "x.idx": "is the index (.idx) of a corpus of tokens; name a sentencepiece model",
        "x.txt": "is a tokenizer of no known kind; give a sentencepiece model",
    }.items():
        with pytest.raises(ConfigError, match=rf"{name}:? {re.escape(message)}"):
            load_tokenizer(tmp_path / name, 65536)


def test_the_vocabulary_of_world_as_text_is_the_name_world(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 '\\x00' 1\n2 '\\x01' 1\n3 '\\x02' 1\n")
    with pytest.raises(ConfigError, match="is the vocabulary of World as text; give the name world instead"):
        load_tokenizer(tmp_path / "rwkv_vocab_v20230424.txt", 65536)


def test_a_tokenizer_that_is_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}})[:-9])
    with pytest.raises(ConfigError, match=r"tokenizer.json is damaged: it begins like JSON .*; get it again"):
        load_tokenizer(tmp_path, 65536)
