"""The tokenizer interface, and streaming decoding."""

from __future__ import annotations

import abc
import codecs
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NO_TEXT = "\ufffd".encode()
"""Bytes of an id for which the tokenizer has no text."""

PROBE = " a  b \r\n\n\t\tdef \ufb01\u2460\u00bd e\u0301 \u00e9 \x00\x7f \u65e5\u672c \U0001f469\u200d\U0001f467 \u2581 "
"""Text that lossy tokenizers change: leading, trailing and repeated spaces, line ends, tabs, compatibility characters
that normalization rewrites, and characters too rare for a vocabulary."""


class SavedTokenizer(NamedTuple):
    """A tokenizer as a file."""

    name: str
    """File name by which `load_tokenizer` finds it in a folder."""
    content: bytes


class Tokenizer(abc.ABC):
    """Converts text to token ids, of which each stands for fixed bytes, and back.

    Each kind documents which texts it preserves exactly.
    """

    def __init__(self, table: Sequence[bytes], end_of_text: int, saved: SavedTokenizer, padding: int = 0) -> None:
        """`table[id]` is an id's bytes; the last `padding` ids exist in the model only."""
        self._table = table
        self.vocab_size = len(table) - padding
        """Number of ids; each id is in [0, vocab_size)."""
        self.end_of_text = end_of_text
        """Id between documents; `encode` never produces it, whatever the text."""
        self.begin: tuple[int, ...] = (end_of_text,)
        """Ids before the first of a text that a model writes on: RWKV begins texts as documents begin in its data."""
        self.ends = frozenset({end_of_text})
        """Ids with which a model ends a text that it writes."""
        self.saved = saved
        """The file from which `load_tokenizer` restores the tokenizer."""
        self.fingerprint = hashlib.blake2b(saved.content, digest_size=16).hexdigest()
        """Hex digest of everything that affects `encode`."""

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids of a text that has not begun: those with which texts begin, or the end of another one."""
        return self.begin or (self.end_of_text,)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UnicodeEncodeError for lone surrogates, which no UTF-8 text holds."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; invalid UTF-8 (half a character) becomes U+FFFD, end_of_text an empty string.

        Raises IndexError for an id outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id, possibly only part of a character; empty for end_of_text.

        U+FFFD for an id that the model has but the tokenizer lacks. Raises IndexError for an id outside the vocabulary.
        """
        if not 0 <= token < len(self._table):
            raise IndexError(f"token {token}: the ids of this tokenizer are 0 to {self.vocab_size - 1}")
        return self._table[token]

    def is_named(self, token: int) -> bool:
        """Whether the tokenizer has a text for this id of the model; others must not be sampled."""
        return 0 <= token < len(self._table) and self._table[token] is not NO_TEXT


class StreamingDecoder:
    """Decodes ids one by one; returns whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For ids of this tokenizer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text completed by this id, possibly empty; all pushes and the flush concatenated equal `decode`."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """U+FFFD for an incomplete character, else an empty string; resets for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
