"""Converts a text source to official token files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.encoding import encode_document
from rwkv_jax.data.text.sources import read_documents
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens.binidx import BinidxWriter, find_binidx


class Tokenized(NamedTuple):
    """The files written, and their size."""

    bin_path: Path
    idx_path: Path
    num_tokens: int
    num_documents: int


def tokenize(
    data: DataConfig, tokenizer: Tokenizer, target: str | os.PathLike[str], report: Callable[[str], None]
) -> Tokenized:
    """Writes the documents of `data.source`, in their order, to TARGET.bin and TARGET.idx; end_of_text follows each.

    One document is in memory at a time. Nothing is held out; that happens in training. `report` gets lines to print,
    one of them the number of documents that do not survive a round trip through the tokenizer.
    Raises ConfigError for a source that cannot be read or already contains tokens, and for files that exist.
    """
    if find_binidx(data.source) is not None:
        raise ConfigError(f"data.source = {data.source!r}: holds tokens already; name a source of text")
    changed = 0
    with BinidxWriter(Path(target).expanduser(), tokenizer.vocab_size) as writer:
        for document in read_documents(data, report):
            changed += not encode_document(tokenizer, document, writer.write)
            writer.write([tokenizer.end_of_text])
            writer.end_document()
    if changed:
        report(f"the tokenizer changes the text of {changed} of {writer.num_documents} documents, as by normalization")
    return Tokenized(*writer.paths, writer.num_tokens, writer.num_documents)
