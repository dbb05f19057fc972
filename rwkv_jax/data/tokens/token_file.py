"""The corpus that training and evaluation read: token streams with their sizes in bytes and documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkv_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """Training or held-out tokens of a source: [n] of any integer dtype, memory-mapped.

    end_of_text follows each document; text that we tokenized also starts with one, so that its first token is predicted
    too.
    """

    path: Path
    tokens: np.ndarray
    num_bytes: int
    """UTF-8 bytes of the documents; an estimate for the training tokens of a large binidx."""
    num_documents: int
    mask: np.ndarray | None = None
    """[n] bool, the tokens that count as targets; None if all do."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.tokens.shape:
            raise ValueError(f"{self.path}: mask of shape {self.mask.shape} for tokens of shape {self.tokens.shape}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including each end_of_text."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per predicted token (all but the first): bits per byte = bits per token / this."""
        return self.num_bytes / (self.num_tokens - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """An opened corpus."""

    sources: tuple[TokenFile, ...]
    """Training tokens, one file per source."""
    shares: tuple[int, ...]
    """Rows of each source in a period of the mixture; (1,) for a single source."""
    held_out: TokenFile | None
    """Held-out tokens of all sources, concatenated; None if nothing is held out."""
    held_out_bytes: Callable[[], bytes]
    """Reads the held-out documents, concatenated, as UTF-8 (`held_out.num_bytes` bytes)."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of training and held-out tokens, and of a mixture's shares."""
    folder: Path | None = None
    """The folder in `data.cache_dir`, for text that we tokenized."""

    @property
    def train(self) -> TokenFile:
        """The training tokens of a corpus with one source. Raises ValueError for a mixture."""
        (train,) = self.sources
        return train

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per predicted token: the mean over sources, weighted by their shares."""
        weighted = zip(self.shares, self.sources, strict=True)
        return sum(share * source.bytes_per_token for share, source in weighted) / sum(self.shares)


def first_wrong_token(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Position of the first token outside the vocabulary, or None; there must be at least one token."""
    whole = tokens.dtype.kind in "iu"
    if whole and 0 <= tokens.min() <= tokens.max() < vocab_size:  # the usual case, at the cost of two reductions
        return None
    right = (tokens >= 0) & (tokens < vocab_size) & (whole or tokens == np.floor(tokens))
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else None
