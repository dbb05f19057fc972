"""Encodes documents in spans, to bound the memory for a long one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.split import Document
from rwkv_jax.data.tokenizers import Tokenizer

_ENCODED_CHARACTERS = 2**20  # at a time: the encoder takes about 100 bytes of memory for each


def encode_document(
    tokenizer: Tokenizer,
    document: Document,
    write: Callable[[list[int]], None],
    span_length: int = _ENCODED_CHARACTERS,
) -> bool:
    """Calls `write` with the tokens of each span of a document; returns whether they decode to the same text.

    There is no end_of_text. Spans end at a line break if there is one within `span_length` characters.
    Raises ConfigError with the document's name for a text that the tokenizer rejects.
    """
    comes_back = True
    for span in _line_spans(document.text, span_length):
        try:
            tokens = tokenizer.encode(span)
        except ConfigError as error:
            raise ConfigError(f"document {document.name}: {error}") from error
        write(tokens)
        comes_back = comes_back and tokenizer.decode(tokens) == span
    return comes_back


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Number of UTF-8 bytes of each id, [V] int64; 0 for end_of_text."""
    return np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64)


def _line_spans(text: str, length: int) -> Iterator[str]:
    start = 0
    while len(text) - start > length:
        end = text.rfind("\n", start, start + length) + 1
        end = end if end > start else start + length
        yield text[start:end]
        start = end
    yield text[start:]
