"""The tokenizer of a synthetic task: a list of symbols, which texts separate by blanks."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence

from typing_extensions import override

from rwkv_jax.checks import shown
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, SavedTokenizer, Tokenizer


class SymbolTokenizer(Tokenizer):
    """Each symbol is a token; id 0 is end_of_text, and the symbols follow in their order.

    Decoding writes a blank before each symbol. Texts of other words than the symbols have no tokens. A model may have
    more ids than there are symbols; these decode to U+FFFD.
    """

    def __init__(self, symbols: Sequence[str]) -> None:
        """Raises ConfigError for symbols that a text could not tell apart."""
        wrong = [symbol for symbol in symbols if symbol.split() != [symbol]]
        if wrong or not symbols or len(set(symbols)) != len(symbols):
            what = f"{shown(wrong[0])} is empty or has a blank in it" if wrong else "none, or one of them twice"
            raise ConfigError(f"symbols of a tokenizer: {what}; give different words")
        record = json.dumps({"kind": "symbols", "symbols": list(symbols)}) + "\n"
        table = [b"", *(f" {symbol}".encode() for symbol in symbols)]
        super().__init__(table, 0, SavedTokenizer("tokenizer.kind.json", record.encode()))
        self.symbols = tuple(symbols)
        """Of ids 1, 2, ..."""
        self._ids = {symbol: token for token, symbol in enumerate(symbols, start=1)}

    @override
    def encode(self, text: str) -> list[int]:
        """Ids of the symbols in a text. Raises ConfigError with the nearest symbols for a word that is none."""
        words = text.split()
        for word in words:
            if word not in self._ids:
                nearest = difflib.get_close_matches(word, self._ids, cutoff=0) or list(self._ids)[:3]
                raise ConfigError(
                    f"text = {shown(text)}: {shown(word)} is no symbol of this task, of which there are "
                    f"{len(self._ids)}, such as {' '.join(nearest)}; separate symbols by blanks"
                )
        return [self._ids[word] for word in words]

    @override
    def token_bytes(self, token: int) -> bytes:
        """A blank and the symbol; empty for end_of_text, U+FFFD for an id that only the model has."""
        return NO_TEXT if token >= self.vocab_size else super().token_bytes(token)
