"""A corpus as training and evaluation see it: streams of tokens, and their sizes in bytes and documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkv_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """One side of a corpus, or of one of its sources: [n] tokens of any integer dtype, memory-mapped.

    end_of_text comes after each document, and in text that we tokenized also first, so that every token of text has a
    predecessor to be predicted from.
    """

    path: Path
    tokens: np.ndarray
    num_bytes: int
    """UTF-8 bytes of the documents; of the training side of a large binidx an estimate."""
    num_documents: int
    mask: np.ndarray | None = None
    """[n] bool, which tokens count where they are to be predicted; None where all do."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.tokens.shape:
            raise ValueError(f"{self.path}: mask of shape {self.mask.shape} for tokens of shape {self.tokens.shape}")

    @property
    def num_tokens(self) -> int:
        """Tokens in the file, each end_of_text included."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each predicted token (all but the first): bits per byte = bits per token / this."""
        return self.num_bytes / (self.num_tokens - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus, opened."""

    sources: tuple[TokenFile, ...]
    """Training tokens, one file a source."""
    shares: tuple[int, ...]
    """Rows of each source in a period of the mixture; (1,) where there is one source."""
    held_out: TokenFile | None
    """Held-out tokens of all sources, concatenated; None if nothing is held out."""
    read_held_out: Callable[[], bytes]
    """Reads the held-out documents."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of the tokens of both sides, and of the shares of a mixture."""
    folder: Path | None = None
    """The folder in `data.cache_dir`, for text that we tokenized."""

    @property
    def train(self) -> TokenFile:
        """The training tokens of a corpus of one source. Raises ValueError for a mixture."""
        (train,) = self.sources
        return train

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each predicted token of the rows: the mean over the sources by their shares."""
        weighted = zip(self.shares, self.sources, strict=True)
        return sum(share * source.bytes_per_token for share, source in weighted) / sum(self.shares)

    def held_out_bytes(self) -> bytes:
        """The held-out documents, one after the other, as UTF-8 (`held_out.num_bytes` of them)."""
        return self.read_held_out()


def first_wrong_token(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Position of the first token outside the vocabulary, or None; there must be at least one token."""
    whole = tokens.dtype.kind in "iu"
    if whole and 0 <= tokens.min() <= tokens.max() < vocab_size:  # the usual case, at the cost of two reductions
        return None
    right = (tokens >= 0) & (tokens < vocab_size) & (whole or tokens == np.floor(tokens))
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else None
