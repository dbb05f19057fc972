"""What the tests ask of a corpus that has it, and a writer of official token files by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_jax.data.corpus import Corpus, TokenFile


def quiet(line: str) -> None:
    """Reports nothing."""


def folder_of(corpus: Corpus) -> Path:
    """The folder of a corpus that has one."""
    assert corpus.folder is not None
    return corpus.folder


def held_out_of(corpus: Corpus) -> TokenFile:
    """The held-out side of a corpus that has one."""
    assert corpus.held_out is not None
    return corpus.held_out


def flat(documents: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of documents, one after the other."""
    return [token for document in documents for token in document]


def idx_bytes(
    sizes: Sequence[int],
    *,
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int = 8,
    itemsize: int = 2,
    pointers: Sequence[int] | None = None,
    boundaries: Sequence[int] | None = None,
) -> bytes:
    """An .idx, number by number."""
    if pointers is None:
        pointers = [itemsize * sum(sizes[:item]) for item in range(len(sizes))]
    if boundaries is None:
        boundaries = range(len(sizes) + 1)
    content = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    content += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(boundaries))
    content += b"".join(struct.pack("<i", size) for size in sizes)
    content += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    return content + b"".join(struct.pack("<q", boundary) for boundary in boundaries)


def write_pair(stem: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", code: int = 8) -> Path:
    """Writes STEM.bin and STEM.idx; returns the path of the .bin."""
    tokens = np.array(flat(documents), dtype)
    stem.with_name(stem.name + ".bin").write_bytes(tokens.tobytes())
    sizes = [len(document) for document in documents]
    stem.with_name(stem.name + ".idx").write_bytes(idx_bytes(sizes, code=code, itemsize=tokens.itemsize))
    return stem.with_name(stem.name + ".bin")
