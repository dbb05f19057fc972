"""Base class of tokenizers in which each id stands for fixed bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from rwkv_jax.data.tokenizers.protocol import SavedTokenizer

NO_TEXT = "\ufffd".encode()
"""Bytes of an id for which the tokenizer has no text."""

PROBE = " a  b \r\n\n\t\tdef \ufb01\u2460\u00bd e\u0301 \u00e9 \x00\x7f \u65e5\u672c \U0001f469\u200d\U0001f467 \u2581 "
"""Text that lossy tokenizers change: leading, trailing and repeated spaces, line ends, tabs, compatibility characters
that normalization rewrites, and characters too rare for a vocabulary."""


class TableTokenizer:
    """A `Tokenizer` without `encode`, from the bytes of each id."""

    def __init__(self, table: Sequence[bytes], end_of_text: int, saved: SavedTokenizer, padding: int = 0) -> None:
        """`table[id]` is an id's bytes; the last `padding` ids exist in the model only."""
        self._table = table
        self.vocab_size = len(table) - padding
        self.end_of_text = end_of_text
        self.saved = saved
        self.fingerprint = hashlib.blake2b(saved.content, digest_size=16).hexdigest()

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises IndexError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id. Raises IndexError for an id outside the vocabulary."""
        if not 0 <= token < len(self._table):
            raise IndexError(f"token {token}: the ids of this tokenizer are 0 to {self.vocab_size - 1}")
        return self._table[token]

    def is_named(self, token: int) -> bool:
        """Whether the tokenizer has a text for this id of the model."""
        return token < len(self._table) and self._table[token] is not NO_TEXT
