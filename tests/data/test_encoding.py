"""Documents are encoded in spans that together are the document."""

from __future__ import annotations

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.encoding import encode_document, token_byte_lengths
from rwkv_jax.data.text.split import Document
from rwkv_jax.data.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer
from tests.data.texts import KINDS


def test_spans_end_at_lines_where_there_are_any(lines: str) -> None:
    text, tokenizer = lines + "x" * 250 + "\n" + lines, WorldTokenizer()
    spans: list[str] = []
    assert encode_document(tokenizer, Document("x", text), lambda tokens: spans.append(tokenizer.decode(tokens)), 100)
    assert "".join(spans) == text
    assert max(map(len, spans)) == 100
    assert all(span.endswith("\n") for span in spans if "x" * 50 not in span)


def test_a_short_document_is_one_span(lines: str) -> None:
    written: list[list[int]] = []
    assert encode_document(WorldTokenizer(), Document("x", lines), written.append)
    assert written == [WorldTokenizer().encode(lines)]


def test_a_document_that_is_refused_is_named() -> None:
    with pytest.raises(ConfigError, match=r"document a/b\.txt: the text holds a NUL"):
        encode_document(ByteTokenizer(256), Document("a/b.txt", "\x00"), lambda tokens: None)


@pytest.mark.parametrize("kind", KINDS)
def test_byte_lengths_add_up_to_the_text(every_kind: dict[str, Tokenizer], kind: str, lines: str) -> None:
    tokenizer = every_kind[kind]
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == tokenizer.vocab_size
    assert lengths[tokenizer.end_of_text] == 0
    assert int(lengths[tokenizer.encode(lines)].sum()) == len(lines.encode())
