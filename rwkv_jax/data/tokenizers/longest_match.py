"""Tokenizers that take the longest entry at each place of a text, as World's does, with any vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, SavedTokenizer, Tokenizer

MAX_ENTRY = 1024
"""Bytes of an entry; World's longest has 128. It bounds the work at each place of a text."""


class LongestMatchTokenizer(Tokenizer):
    """Greedy longest match over UTF-8 bytes, in time proportional to the text; preserves every text exactly."""

    def __init__(self, table: Sequence[bytes], end_of_text: int, saved: SavedTokenizer, padding: int = 0) -> None:
        """`table[id]` is an id's bytes; those that are empty or `NO_TEXT` are never taken.

        Raises ConfigError if an entry is longer than `MAX_ENTRY`. Each byte that UTF-8 has must be an entry.
        """
        super().__init__(table, end_of_text, saved, padding)
        self._ids = {text: token for token, text in enumerate(table) if text and text is not NO_TEXT}
        lengths: dict[bytes, set[int]] = {}
        for text, token in self._ids.items():
            if len(text) > MAX_ENTRY:
                raise ConfigError(f"the entry of id {token} has {len(text)} bytes; at most {MAX_ENTRY} are read")
            lengths.setdefault(text[:2], set()).add(len(text))
        # The longest first; a single byte is an entry whatever follows it.
        self._lengths = {begin: (*sorted(found - {1}, reverse=True), 1) for begin, found in lengths.items()}

    @override
    def encode(self, text: str) -> list[int]:
        content, tokens, start = text.encode(), list[int](), 0
        ids, lengths = self._ids, self._lengths
        while start < len(content):
            for length in lengths.get(content[start : start + 2], (1,)):
                if (token := ids.get(content[start : start + length])) is not None:
                    tokens.append(token)
                    start += length  # beyond the end where a shorter entry is all that is left
                    break
            else:
                raise ValueError(f"the byte {content[start]:#04x} is no entry")
        return tokens
