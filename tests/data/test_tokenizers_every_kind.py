"""What holds for every kind: texts come back, end_of_text is never spelled, streaming shows whole characters only, a
saved tokenizer is found again, and a corpus can be made with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.data.corpus_folder import load_corpus
from rwkv_jax.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    SentencePieceTokenizer,
    StreamingDecoder,
    Tokenizer,
    fits_model,
    load_tokenizer,
    save_tokenizer,
)
from tests.data.corpora import folder_of, held_out_of
from tests.data.texts import KINDS, TEXTS

each_kind = pytest.mark.parametrize("kind", KINDS)


def permitted(kind: str, text: str) -> str:
    """The text without what this kind refuses."""
    return text.replace("\x00", "") if kind == "256 bytes" else text


@each_kind
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=f"a{END_OF_TEXT}b</s><|padding|>")
def test_every_text_comes_back(every_kind: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer, text = every_kind[kind], permitted(kind, text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.end_of_text not in tokens
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


@each_kind
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_streaming_a_text_shows_whole_characters_only(every_kind: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer, text = every_kind[kind], permitted(kind, text)
    decoder, shown = StreamingDecoder(tokenizer), ""
    for token in tokenizer.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


@each_kind
@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.floats(0, 1, exclude_max=True), max_size=30))
def test_any_ids_are_the_bytes_of_each_and_streaming_agrees(
    every_kind: dict[str, Tokenizer], kind: str, shares: list[float]
) -> None:
    tokenizer = every_kind[kind]
    tokens = [int(share * tokenizer.vocab_size) for share in shares]
    text = tokenizer.decode(tokens)
    assert text == b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")
    decoder, shown = StreamingDecoder(tokenizer), ""
    for token in tokens:
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown + decoder.flush() == text
    assert decoder.flush() == ""


@each_kind
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40))
@example(content="é日👩".encode()[:-1] + "é日👩".encode())
def test_any_bytes_can_be_written_and_read(every_kind: dict[str, Tokenizer], kind: str, content: bytes) -> None:
    """Whatever a model writes byte by byte, whole characters or not."""
    tokenizer = every_kind[kind]
    content = content.replace(b"\x00", b"") if kind == "256 bytes" else content
    ids = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)} if kind != "world" else {}
    tokens = [value + 1 if kind == "world" else ids[bytes([value])] for value in content]
    assert b"".join(map(tokenizer.token_bytes, tokens)) == content
    assert tokenizer.decode(tokens) == content.decode("utf-8", "replace")
    decoder = StreamingDecoder(tokenizer)
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == tokenizer.decode(tokens)


@each_kind
def test_end_of_text_has_no_text(every_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every_kind[kind]
    end = tokenizer.end_of_text
    assert 0 <= end < tokenizer.vocab_size
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.decode([end, *tokenizer.encode("a"), end, *tokenizer.encode("b")]) == "ab"


@each_kind
def test_what_is_no_text_or_no_id_is_refused(every_kind: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every_kind[kind]
    for text in ("\ud800", "a\udc80b"):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode(text)
    for token in (-1, 10**6):
        with pytest.raises(IndexError, match=f"token {token}: the ids of this tokenizer are 0 to"):
            tokenizer.token_bytes(token)
        with pytest.raises(IndexError):
            tokenizer.decode([token])


def test_bytes_are_their_values() -> None:
    assert ByteTokenizer(256).encode("aé") == ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
    assert ByteTokenizer().encode("\x00") == [0]
    assert (ByteTokenizer().end_of_text, ByteTokenizer().vocab_size) == (256, 257)
    assert (ByteTokenizer(256).end_of_text, ByteTokenizer(256).vocab_size) == (0, 256)
    with pytest.raises(ConfigError, match=r"holds a NUL character.*set model\.vocab_size to 257"):
        ByteTokenizer(256).encode("a\x00")
    with pytest.raises(ConfigError, match="not 300"):
        ByteTokenizer(300)


def test_fingerprints_differ(every_kind: dict[str, Tokenizer]) -> None:
    assert len({tokenizer.fingerprint for tokenizer in every_kind.values()}) == len(KINDS)


@each_kind
def test_what_is_saved_is_found_again(every_kind: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = every_kind[kind]
    path = save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    assert list(path.parent.iterdir()) == [path]
    for spec in (path, str(path), path.parent):
        found = load_tokenizer(spec, tokenizer.vocab_size)
        assert type(found) is type(tokenizer)
        assert found.fingerprint == tokenizer.fingerprint
        assert found.vocab_size == tokenizer.vocab_size
        assert found.encode("def f(x):  # café") == tokenizer.encode("def f(x):  # café")
    assert save_tokenizer(found, path.parent) == path


def test_given_files_are_saved_as_they_were(
    every_kind: dict[str, Tokenizer], model_path: Path, json_path: Path, tmp_path: Path
) -> None:
    for kind, given_path, name in (
        ("sentencepiece", model_path, "tokenizer.model"),
        ("hugging face", json_path, "tokenizer.json"),
    ):
        path = save_tokenizer(every_kind[kind], tmp_path / kind)
        assert path.name == name
        assert path.read_bytes() == given_path.read_bytes()


@pytest.mark.parametrize(("first", "second"), [("257 bytes", "256 bytes"), ("sentencepiece", "world")])
def test_another_tokenizer_is_not_overwritten(
    every_kind: dict[str, Tokenizer], first: str, second: str, tmp_path: Path
) -> None:
    path = save_tokenizer(every_kind[first], tmp_path)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="is another tokenizer and is not overwritten"):
        save_tokenizer(every_kind[second], tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_a_tokenizer_that_comes_at_the_very_end_is_not_overwritten(
    every_kind: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_too_late(temporary: Path, path: Path) -> None:
        path.write_text("precious")
        link(temporary, path)

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        save_tokenizer(every_kind["257 bytes"], tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_saving_is_whole_or_not_at_all(
    every_kind: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_tokenizer(every_kind["257 bytes"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path, 257)


def test_a_folder_must_hold_one_tokenizer(every_kind: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer: none of tokenizer\.model, tokenizer\.json"):
        load_tokenizer(tmp_path, 257)
    for kind in ("sentencepiece", "257 bytes"):
        saved = every_kind[kind].saved
        (tmp_path / saved.name).write_bytes(saved.content)
    with pytest.raises(ConfigError, match=r"holds tokenizer\.model and tokenizer\.kind\.json; name the file"):
        load_tokenizer(tmp_path, 257)
    assert load_tokenizer(tmp_path / "tokenizer.kind.json", 257).vocab_size == 257


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: the download or copy did not finish; get it again"),
        (b"\x01", "of no known kind; give a sentencepiece model, a Hugging Face tokenizer.json, a folder"),
        (b"1 '\\x00' 1\n", "of no known kind"),
        (b"[]", "of no known kind"),
        (b'{"vocab": {}}', "of no known kind"),
        (b'{"kind": ', "is damaged: it begins like JSON"),
        (b"{\xff}", "is damaged: it begins like JSON"),
        (b"\n garbage", "is not a sentencepiece model"),
        (b'{"model": {"type": "BPE"}}', "is not a tokenizer.json that can be read"),
        (b'{"kind": "morse"}', 'a tokenizer that this version does not have: {"kind": "morse"}'),
        (b'{"kind": "bytes"}', "a tokenizer that this version does not have"),
        (b'{"kind": "bytes", "vocab_size": 300}', "a tokenizer that this version does not have"),
        (b'{"kind": "world", "vocabulary": "rwkv_vocab_v20990101"}', "a tokenizer that this version does not have"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path / "x", 257)
    assert str(tmp_path / "x") in str(caught.value)


def test_a_name_that_is_no_tokenizer_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer = 'wrld': cannot read it.*names world and bytes"):
        load_tokenizer("wrld", 65536)


@each_kind
def test_a_tokenizer_of_another_size_is_refused(every_kind: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = every_kind[kind]
    size = tokenizer.vocab_size
    path = save_tokenizer(tokenizer, tmp_path)
    for other in (1, size - 1, size + 1, size * 9):
        assert not fits_model(tokenizer, other)
        with pytest.raises(
            ConfigError,
            match=f"does not match, it has {size} entries and the model has vocab_size = {other}; "
            f"name the model's own tokenizer; .* set model.vocab_size to {size} or leave",
        ):
            load_tokenizer(path, other)


def test_the_model_decides_which_bytes_are_meant() -> None:
    assert load_tokenizer("bytes", 256).vocab_size == 256
    assert load_tokenizer("bytes", 257).vocab_size == 257
    with pytest.raises(ConfigError, match=r"'bytes': does not match, it has 257 entries and the model has .* 8192"):
        load_tokenizer("bytes", 8192)


def test_only_tokenizers_of_hugging_face_may_be_smaller_than_the_model(every_kind: dict[str, Tokenizer]) -> None:
    fitting = {kind: [size for size in range(70000) if fits_model(every_kind[kind], size)] for kind in KINDS}
    assert fitting == {
        "sentencepiece": [380],
        "hugging face": [405, 448, 512, 576, 640, 704, 768, 832, 896],
        "longest match": [430, 448, 512, 576, 640, 704, 768, 832, 896],
        "world": [65536],
        "257 bytes": [257],
        "256 bytes": [256],
    }
    padded = every_kind["hugging face"]
    assert padded.decode([895, *padded.encode("a")]) == "\ufffda"


@pytest.fixture
def source(tmp_path: Path, lines: str) -> Path:
    """A folder of 10 files."""
    folder = tmp_path / "source"
    folder.mkdir()
    parts = lines.split("\n\n")
    for i in range(10):
        (folder / f"{i}.py").write_text("\n\n".join(parts[20 * i : 20 * i + 20]), encoding="utf-8", newline="")
    return folder


def documents(tokens: np.ndarray, corpus: Corpus) -> list[str]:
    ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
    assert (ends[0], ends[-1]) == (0, len(tokens) - 1)
    return [corpus.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("spec", "vocab_size", "file"),
    [
        ("bytes", 256, "tokenizer.kind.json"),
        ("bytes", 257, "tokenizer.kind.json"),
        ("world", 65536, "tokenizer.kind.json"),
        ("model", 380, "tokenizer.model"),
        ("json", 405, "tokenizer.json"),
        ("json", 512, "tokenizer.json"),
        ("word piece", 430, "tokenizer.json"),
    ],
)
def test_a_corpus_of_each_kind(
    source: Path,
    tmp_path: Path,
    model_path: Path,
    json_path: Path,
    word_piece_path: Path,
    spec: str,
    vocab_size: int,
    file: str,
) -> None:
    spec = {"model": str(model_path), "json": str(json_path), "word piece": str(word_piece_path)}.get(spec, spec)
    data = DataConfig(source=str(source), held_out=0.2, tokenizer=spec, cache_dir=str(tmp_path / "cache"))
    reports: list[str] = []
    corpus = prepare_corpus(data, vocab_size, reports.append)
    texts = [path.read_bytes().decode() for path in source.iterdir()]
    found = documents(corpus.train.tokens, corpus) + documents(held_out_of(corpus).tokens, corpus)
    assert sorted(found) == sorted(texts)
    names = sorted(path.name for path in folder_of(corpus).iterdir())
    assert names == sorted(["corpus.json", "held_out.bin", "held_out.txt", "train.bin", file])
    assert not any("changes the text" in line for line in reports)
    again = prepare_corpus(data, vocab_size, reports.append)
    assert (again.folder, again.fingerprint) == (folder_of(corpus), corpus.fingerprint)
    assert sum("tokenized" in line for line in reports) == 1


def test_a_model_that_is_padded_shares_the_corpus_of_one_that_is_not(
    source: Path, tmp_path: Path, json_path: Path
) -> None:
    data = DataConfig(source=str(source), held_out=0.2, tokenizer=str(json_path), cache_dir=str(tmp_path / "cache"))
    folders = {prepare_corpus(data, size, lambda line: None).folder for size in (405, 448, 512)}
    assert len(folders) == 1


def test_documents_that_a_tokenizer_changes_are_counted(source: Path, tmp_path: Path, json_path: Path) -> None:
    description = json.loads(json_path.read_bytes()) | {"normalizer": {"type": "NFC"}}
    path = tmp_path / "nfc.json"
    path.write_text(json.dumps(description))
    for i in range(3):
        (source / f"decomposed{i}.py").write_text(f"# cafe\u0301 {i}\n", encoding="utf-8")
    data = DataConfig(source=str(source), held_out=0.2, tokenizer=str(path), cache_dir=str(tmp_path / "cache"))
    reports: list[str] = []
    corpus = prepare_corpus(data, 405, reports.append)
    assert "the tokenizer changes the text of 3 of 13 documents, as by normalization" in reports
    found = documents(corpus.train.tokens, corpus) + documents(held_out_of(corpus).tokens, corpus)
    assert sum("caf\u00e9 " in text for text in found) == 3
    # A single document is two, one for each side.
    (tmp_path / "one.txt").write_text("cafe\u0301\n" * 200, encoding="utf-8")
    prepare_corpus(dataclasses.replace(data, source=str(tmp_path / "one.txt")), 405, reports.append)
    assert "the tokenizer changes the text of 2 of 2 documents, as by normalization" in reports


def test_a_document_that_cannot_be_encoded_is_named(source: Path, tmp_path: Path) -> None:
    (source / "nul.py").write_text("a\x00b\n")
    data = DataConfig(source=str(source), held_out=0.2, tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"document nul\.py: the text holds a NUL character"):
        prepare_corpus(data, 256, lambda line: None)
    assert list(Path(data.cache_dir).iterdir()) == []
    prepare_corpus(data, 257, lambda line: None)


def test_a_corpus_whose_tokenizer_is_another_one_is_damaged(source: Path, tmp_path: Path) -> None:
    """Also where the file of the tokenizer holds its name only, and is as it was."""
    data = DataConfig(source=str(source), held_out=0.2, tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    folder = folder_of(prepare_corpus(data, 257, lambda line: None))
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    record = json.loads((changed / "corpus.json").read_text())
    (changed / "corpus.json").write_text(json.dumps(record | {"tokenizer_fingerprint": "0" * 32}))
    with pytest.raises(ConfigError, match="is damaged: its tokenizer is not the one that made the tokens"):
        load_corpus(changed)
    (folder / "tokenizer.kind.json").unlink()
    with pytest.raises(ConfigError, match=r"is damaged: tokenizer\.kind\.json is missing"):
        load_corpus(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is damaged: .*recursion"),
        (b'{"kind": "bytes", "vocab_size": 256.0}', "describes a tokenizer that this version does not have"),
        (b'{"kind": "bytes", "vocab_size": [257]}', "describes a tokenizer that this version does not have"),
        (b'{"kind": "bytes", "kind": "world"}', "is damaged: .*names twice: kind"),
        (b'{"kind": "\\ud800"}', "describes a tokenizer that this version does not have"),
    ],
    ids=["deep", "a float", "a list", "twice", "a surrogate"],
)
def test_json_that_no_tokenizer_writes_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.kind.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tokenizer\.kind\.json {message}"):
        load_tokenizer(tmp_path, 257)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"\xe2\x96\x81", b"\xe2\x96\xff"), (b"<0x41>", b"<0xZZ>"), (b"<|endoftext|>", b"<|end\xfftext|>")],
    ids=["a piece that is not UTF-8", "a byte that is none", "an end of text that is not UTF-8"],
)
def test_a_damaged_sentencepiece_model_is_named(model_path: Path, old: bytes, new: bytes) -> None:
    content = model_path.read_bytes()
    assert old in content
    with pytest.raises(ConfigError, match=r"^x\.model is (a damaged|not a) sentencepiece model"):
        SentencePieceTokenizer(content.replace(old, new), "x.model")
