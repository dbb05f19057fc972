"""Byte-level tokenizer without a vocabulary file."""

from __future__ import annotations

import json

from typing_extensions import override

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import SavedTokenizer, Tokenizer


class ByteTokenizer(Tokenizer):
    """Each UTF-8 byte of a text is a token with its value as id.

    With 257 ids the last is end_of_text. With 256, as in byte-level models, id 0 is end_of_text: NUL, which is rare in
    texts, then has no id, and `encode` raises ConfigError for it.
    """

    SIZES = (256, 257)
    """Supported vocabulary sizes."""

    def __init__(self, vocab_size: int = 257) -> None:
        """With 257 or 256 ids. Raises ConfigError for another number."""
        if vocab_size not in self.SIZES:
            raise ConfigError(f"a byte tokenizer has 257 ids, or 256 without one for NUL, not {vocab_size}")
        end_of_text = 256 if vocab_size == 257 else 0
        table = [bytes([value]) for value in range(256)] + [b""] * (vocab_size - 256)
        table[end_of_text] = b""
        record = json.dumps({"kind": "bytes", "vocab_size": vocab_size}) + "\n"
        super().__init__(table, end_of_text, SavedTokenizer("tokenizer.kind.json", record.encode()))

    @override
    def encode(self, text: str) -> list[int]:
        """Bytes of a text. Raises UnicodeEncodeError for lone surrogates, ConfigError for NUL if it has no id."""
        if self.end_of_text == 0 and "\x00" in text:
            raise ConfigError(
                "the text holds a NUL character, and a byte tokenizer of 256 ids has none for it (0 is end of text); "
                "set model.vocab_size to 257, or take the NULs out"
            )
        return list(text.encode())
