"""Symbols of a synthetic task as a tokenizer: what comes back, what is refused, which models it fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import StreamingDecoder, SymbolTokenizer, fits_model, load_tokenizer, save_tokenizer

TOKENIZER = SymbolTokenizer([".", "|", "k0", "k10", "21345"])


def test_symbols_come_back_whatever_the_blanks() -> None:
    tokens = TOKENIZER.encode("k10\n .\t21345  |")
    assert tokens == [4, 1, 5, 2]
    assert TOKENIZER.decode([0, *tokens, 0]) == " k10 . 21345 |"
    decoder = StreamingDecoder(TOKENIZER)
    assert [decoder.push(token) for token in tokens] == [" k10", " .", " 21345", " |"]
    assert (TOKENIZER.end_of_text, TOKENIZER.vocab_size) == (0, 6)


def test_a_word_that_is_no_symbol_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^text = 'k0 k1': 'k1' is no symbol .* are 5, such as k10 k0"):
        TOKENIZER.encode("k0 k1")


def test_a_saved_one_is_found_again_by_models_with_enough_ids(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZER, tmp_path)
    for vocab_size in (6, 64):
        assert load_tokenizer(tmp_path, vocab_size).fingerprint == TOKENIZER.fingerprint
        assert fits_model(TOKENIZER, vocab_size)
    with pytest.raises(ConfigError, match="has 6 entries and the model has vocab_size = 5"):
        load_tokenizer(tmp_path, 5)


def test_ids_of_the_model_alone_are_not_sampled() -> None:
    assert [TOKENIZER.is_named(token) for token in (0, 5, 6, 63)] == [True, True, False, False]
    assert TOKENIZER.decode([6]) == "\ufffd"
    with pytest.raises(IndexError):
        TOKENIZER.token_bytes(-1)


@pytest.mark.parametrize("symbols", [[], ["a", "a"], ["a b"], [""], ["a\n"]])
def test_symbols_that_no_text_tells_apart_are_refused(symbols: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="symbols of a tokenizer"):
        SymbolTokenizer(symbols)


@pytest.mark.parametrize("content", ['{"kind": "symbols"}', '{"kind": "symbols", "symbols": ["a", 1]}'])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.kind.json").write_text(content)
    with pytest.raises(ConfigError, match="describes a tokenizer that this version does not have"):
        load_tokenizer(tmp_path, 64)
