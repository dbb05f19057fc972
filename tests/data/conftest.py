"""A small text and a tokenizer trained on it, shared by the tests of the data package."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax.data.tokenizers import SentencePieceTokenizer, train_sentencepiece


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
    return SentencePieceTokenizer.load(model_path)
