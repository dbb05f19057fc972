"""What all kinds share: each id stands for some bytes, whatever its neighbors are."""

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
    """A tokenizer but for `encode`: the bytes of each id, and the file that it is saved as."""

    def __init__(self, table: Sequence[bytes], end_of_text: int, saved: SavedTokenizer, padding: int = 0) -> None:
        """`table[id]` are an id's bytes; the last `padding` of them are of a model's ids and not of the tokenizer's."""
        self._table = table
        self._vocab_size = len(table) - padding
        self._end_of_text = end_of_text
        self._saved = saved
        self._fingerprint = hashlib.blake2b(saved.content, digest_size=16).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._vocab_size

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents."""
        return self._end_of_text

    @property
    def fingerprint(self) -> str:
        """Hex digest of what the tokenizer is saved as."""
        return self._fingerprint

    @property
    def saved(self) -> SavedTokenizer:
        """The file from which `load_tokenizer` makes the same tokenizer again."""
        return self._saved

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Raises IndexError for what is no id."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for. Raises IndexError for what is no id."""
        if not 0 <= token < len(self._table):
            raise IndexError(f"token {token}: the ids of this tokenizer are 0 to {self._vocab_size - 1}")
        return self._table[token]

    def is_named(self, token: int) -> bool:
        """Whether an id of the model is one that the tokenizer knows."""
        return token < len(self._table) and self._table[token] is not NO_TEXT
