"""The tokenizer interface, and streaming decoding."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class SavedTokenizer(NamedTuple):
    """A tokenizer as a file."""

    name: str
    """File name by which `load_tokenizer` finds it in a folder."""
    content: bytes


class Tokenizer(Protocol):
    """Converts text to token ids and back. Each kind documents which texts it preserves exactly."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; each id is in [0, vocab_size)."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id between documents; `encode` never produces it, whatever the text."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that affects `encode`."""
        ...

    @property
    def saved(self) -> SavedTokenizer:
        """The file from which `load_tokenizer` restores the tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UnicodeEncodeError for lone surrogates, which no UTF-8 text holds."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; invalid UTF-8 (half a character) becomes U+FFFD, end_of_text an empty string."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id, possibly only part of a character; empty for end_of_text.

        U+FFFD for an id that the model has but the tokenizer lacks. Raises IndexError for an id outside the vocabulary.
        """
        ...

    def is_named(self, token: int) -> bool:
        """Whether the tokenizer has a text for this id of the model; others must not be sampled."""
        ...


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
