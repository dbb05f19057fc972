"""Base class of all kinds of tokenizers: each id stands for some bytes, whatever its neighbors are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from rwkv_jax.data.tokenizers.protocol import SavedTokenizer

NO_TEXT = "\ufffd".encode()
"""Bytes of an id that a model has and the tokenizer has no text for."""

PROBE = " a  b \r\n\n\t\tdef \ufb01\u2460\u00bd e\u0301 \u00e9 \x00\x7f \u65e5\u672c \U0001f469\u200d\U0001f467 \u2581 "
"""What tokenizers which are not made for every text change: spaces at the ends and in runs, line ends, tabs,
compatibility characters that normalization rewrites, and characters too rare for a vocabulary."""


class TableTokenizer:
    """A `Tokenizer` but for `encode`, from the bytes that each id stands for."""

    def __init__(self, table: Sequence[bytes], end_of_text: int, saved: SavedTokenizer, padding: int = 0) -> None:
        """`table[id]` are an id's bytes; the last `padding` of them are ids of a model that the tokenizer lacks."""
        self._table = table
        self.vocab_size = len(table) - padding
        self.end_of_text = end_of_text
        self.saved = saved
        self.fingerprint = hashlib.blake2b(saved.content, digest_size=16).hexdigest()

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises IndexError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for. Raises IndexError for an id outside the vocabulary."""
        if not 0 <= token < len(self._table):
            raise IndexError(f"token {token}: the ids of this tokenizer are 0 to {self.vocab_size - 1}")
        return self._table[token]

    def is_named(self, token: int) -> bool:
        """Whether an id of the model is one that the tokenizer knows."""
        return token < len(self._table) and self._table[token] is not NO_TEXT
