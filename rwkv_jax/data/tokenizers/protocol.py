"""The interface of all tokenizers, and decoding one id at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class SavedTokenizer(NamedTuple):
    """A tokenizer as a file."""

    name: str
    """Name under which `load_tokenizer` finds it in a folder."""
    content: bytes


class Tokenizer(Protocol):
    """Text to token ids and back. Each kind says which texts come back exactly; none drops any."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; each id is in [0, vocab_size)."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents; `encode` never produces it, whatever the text spells."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides what `encode` gives."""
        ...

    @property
    def saved(self) -> SavedTokenizer:
        """The file from which `load_tokenizer` makes the same tokenizer again."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UnicodeEncodeError for lone surrogates, which no UTF-8 text holds."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (half a character) become U+FFFD, end_of_text becomes nothing."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for, perhaps only part of a character; none for end_of_text.

        U+FFFD for an id that the model has and the tokenizer lacks. Raises IndexError for an id outside the vocabulary.
        """
        ...

    def is_named(self, token: int) -> bool:
        """Whether an id of the model is one that the tokenizer knows; others must not be sampled."""
        ...


class StreamingDecoder:
    """Decodes ids one by one; returns whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For ids of this tokenizer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that this id completes, perhaps none; all pushes and the flush together equal `decode`."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """U+FFFD for a character that was begun and not completed, else nothing; ready for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
