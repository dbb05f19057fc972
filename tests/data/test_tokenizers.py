"""The sentencepiece kind: what its models must be like, and their training, which is repeatable."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import (
    END_OF_TEXT,
    SentencePieceTokenizer,
    StreamingDecoder,
    load_tokenizer,
    train_sentencepiece,
)


def test_half_a_character_is_held_back(tokenizer: SentencePieceTokenizer) -> None:
    tokens = tokenizer.encode("日")
    assert len(tokens) == 3
    decoder = StreamingDecoder(tokenizer)
    assert [decoder.push(token) for token in tokens] == ["", "", "日"]
    assert decoder.push(tokens[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tokenizer.encode("a")[0]) == "a"


def test_end_of_text_is_id_zero_and_has_no_text(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"
    assert tokenizer.vocab_size == 380


@pytest.mark.parametrize("text", [f"a{END_OF_TEXT}b \u2581 <0xE2> \u2581\u2581", "<unk></s>"])
def test_names_of_pieces_are_text_like_any_other(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_indentation_is_few_tokens(tokenizer: SentencePieceTokenizer) -> None:
    assert len(tokenizer.encode("        return")) <= 3


def test_training_is_repeatable_and_silent(
    tmp_path: Path, model_path: Path, lines: str, capfd: pytest.CaptureFixture[str]
) -> None:
    train_sentencepiece([lines], 380, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    train_sentencepiece([lines + "more"], 380, tmp_path / "other.model")
    fingerprints = {load_tokenizer(path, 380).fingerprint for path in (model_path, tmp_path / "other.model")}
    assert len(fingerprints) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.model", "other.model"]
    assert capfd.readouterr() == ("", "")


def test_training_learns_from_texts_with_tabs_nulls_and_long_lines(tmp_path: Path) -> None:
    texts = ["\talpha\tbeta\x00gamma\u2581delta " * 3000]
    train_sentencepiece(texts, 275, tmp_path / "x.model")
    tokenizer = load_tokenizer(tmp_path / "x.model", 275)
    assert len(tokenizer.encode("alpha")) < 5
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_stride_learns_from_a_part(tmp_path: Path) -> None:
    texts = ["abc abd " * 512, "xyz xyw " * 512] * 4
    train_sentencepiece(texts, 264, tmp_path / "x.model", stride=2)
    tokenizer = load_tokenizer(tmp_path / "x.model", 264)
    assert len(tokenizer.encode("xyz")) == 3
    assert len(tokenizer.encode("abc")) < 3


def test_too_large_a_vocabulary_names_the_largest_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = 9000: .* set model.vocab_size to at most \d+") as caught:
        train_sentencepiece(["hello world\n" * 20], 9000, tmp_path / "x.model")
    found = re.search(r"at most (\d+)", str(caught.value))
    assert found
    train_sentencepiece(["hello world\n" * 20], int(found[1]), tmp_path / "x.model")


def test_too_small_a_vocabulary_names_the_smallest_possible(tmp_path: Path, lines: str) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100: .* set model.vocab_size to at least \d+") as caught:
        train_sentencepiece([lines], 100, tmp_path / "x.model")
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found
    train_sentencepiece([lines], int(found[1]), tmp_path / "x.model")


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn a tokenizer from"):
        train_sentencepiece(["\n"], 300, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_training_overwrites_nothing(tmp_path: Path, lines: str) -> None:
    (tmp_path / "x.model").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        train_sentencepiece([lines], 380, tmp_path / "x.model")
    assert (tmp_path / "x.model").read_bytes() == b"precious"


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        SentencePieceTokenizer(content, "x.model")
    with pytest.raises(ConfigError, match=r"tokenizer = .*nowhere.* cannot read it"):
        load_tokenizer(tmp_path / "nowhere", 380)


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(lines: str, options: dict[str, Any]) -> None:
    lossless: dict[str, Any] = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False}
    lossless |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines.splitlines()),
        model_writer=model,
        vocab_size=380,
        minloglevel=2,
        **lossless | options,
    )
    with pytest.raises(ConfigError, match="does not give back the text it is given"):
        SentencePieceTokenizer(model.getvalue(), "x.model")


def test_the_missing_package_is_named(
    lines: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"small.model: needs the package sentencepiece: pip install sentencepiece"):
        load_tokenizer(model_path, 380)
    with pytest.raises(ConfigError, match=r"data.tokenizer = None: needs the package sentencepiece"):
        train_sentencepiece(["text"], 380, tmp_path / "x.model")
