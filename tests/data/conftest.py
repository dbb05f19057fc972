"""A small text and tokenizers of every kind, shared by the tests of the data package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers

from rwkv_jax.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from rwkv_jax.data.tokenizers.byte_level import spell


def make_lines(count: int) -> str:
    """Some Python, different at each line."""
    return "".join(
        f"def function_{i}(value: int) -> int:\n    if value > {i * i}:\n        return value + {i}  # café\n\n"
        for i in range(count)
    )


@pytest.fixture(scope="session")
def lines() -> str:
    """About 20 kB of text."""
    return make_lines(200)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, lines: str) -> Path:
    """A sentencepiece model of 380 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece([lines], 380, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> SentencePieceTokenizer:
    """That model, loaded."""
    return SentencePieceTokenizer(model_path.read_bytes(), str(model_path))


@pytest.fixture(scope="session")
def json_path(tmp_path_factory: pytest.TempPathFactory, lines: str) -> Path:
    """A tokenizer.json of 400 entries and 5 runs of spaces, made as that of GPT-NeoX is, but without a normalizer."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT, "<|padding|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([lines], trainer)
    made.add_tokens([" " * count for count in range(6, 1, -1)])
    path = tmp_path_factory.mktemp("tokenizer") / "any name"
    path.write_text(made.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def word_piece_path(tmp_path_factory: pytest.TempPathFactory, lines: str) -> Path:
    """A tokenizer.json of 430 ids that are matched as World's are, in the form of the RWKV organization's."""
    entries = sorted({*re.findall(r"\w+| +|\W\n+", lines[:1500]), "日本", "\r\n"}, key=str.encode)
    parts = [*(bytes([value]) for value in range(256)), b"\xe6\x97", *(entry.encode() for entry in entries)]
    texts = dict.fromkeys(text for text in parts if text)
    vocabulary = {END_OF_TEXT: 0, **{spell(text): token for token, text in enumerate(texts, 1)}}
    assert len(vocabulary) <= 428
    vocabulary |= {f"\ue000{token}\ue001": token for token in range(len(vocabulary), 430)}
    model = tokenizers.models.WordPiece(
        vocabulary, unk_token=END_OF_TEXT, max_input_chars_per_word=2**31 - 1, continuing_subword_prefix=""
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "any name"
    path.write_text(made.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def every_kind(tokenizer: SentencePieceTokenizer, json_path: Path, word_piece_path: Path) -> dict[str, Tokenizer]:
    """A tokenizer of each kind; KINDS are their names."""
    return {
        "sentencepiece": tokenizer,
        "hugging face": HuggingFaceTokenizer(json_path.read_bytes(), str(json_path)),
        "longest match": load_tokenizer(word_piece_path, 430),
        "world": WorldTokenizer(),
        "257 bytes": ByteTokenizer(257),
        "256 bytes": ByteTokenizer(256),
    }
