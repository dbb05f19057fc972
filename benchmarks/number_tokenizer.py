"""A tokenizer for models of random weights, whose texts mean nothing: a token is its number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rwkv_jax.data.tokenizers import SavedTokenizer


@dataclasses.dataclass(frozen=True)
class NumberTokenizer:
    """Token 17 is the text "17 "; token 0 stands between texts. A `rwkv_jax.data.tokenizers.Tokenizer`."""

    vocab_size: int

    end_of_text = 0

    @property
    def fingerprint(self) -> str:
        """Of its size."""
        return f"numbers below {self.vocab_size}"

    @property
    def saved(self) -> SavedTokenizer:
        """It is not for saving."""
        raise NotImplementedError("a NumberTokenizer is made, never loaded")

    def encode(self, text: str) -> list[int]:
        """Ids of numbers that stand between spaces."""
        return [int(word) for word in text.split()]

    def decode(self, tokens: Iterable[int]) -> str:
        """The numbers."""
        return "".join(self.token_bytes(token).decode() for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        """One number and a space; nothing for the end of a text."""
        return f"{token} ".encode() if token != self.end_of_text else b""

    def is_named(self, token: int) -> bool:
        """Every id of the model is."""
        return 0 <= token < self.vocab_size
