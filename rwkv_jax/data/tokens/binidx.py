"""Reads (memory-mapped) and writes (streaming) the official token files PATH.bin and PATH.idx (binidx, from Megatron).

The .bin contains the tokens of all documents, concatenated. The .idx, all numbers little-endian:

    9 bytes       b"MMIDIDX", 0, 0
    uint64        version, 1
    uint8         dtype of the tokens
    uint64        n, number of items (the official tools write one per document)
    uint64        m, number of document boundaries
    n x int32     tokens of each item
    n x int64     byte of the .bin at which each item begins
    m x int64     items before each document's first, and after the last document's last

The trainer reads the .bin as one stream and ignores the items. Format: RWKV-LM, RWKV-v5/src/binidx.py. What the two
were when they were written stands in a third file of ours, PATH.digest.json (`digest_file`).
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rwkv_jax.atomic import already_exists, atomic_rename, flush_to_disk, refuse_existing, temporary_name
from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.files import explain_refusal
from rwkv_jax.data.tokens.digest_file import digest_content, digest_path
from rwkv_jax.data.tokens.token_file import first_wrong_token
from rwkv_jax.file_kinds import Kind

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),  # Python's float and numpy's double have separate codes
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_ITEM_TOKENS = 2**31 - 1

_BLOCK_ITEMS = 2**20
_DIGEST_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**20
_MAX_BLOCKS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Binidx:
    """An opened pair of files; all arrays are memory-mapped."""

    bin_path: Path
    idx_path: Path
    tokens: np.ndarray
    """All tokens as one stream, in the file's dtype."""
    sizes: np.ndarray
    """Tokens of each item, [n] int32."""
    pointers: np.ndarray
    """Byte of the .bin at which each item begins, [n] int64."""
    boundaries: np.ndarray
    """Items before each document, [m] int64; the last may equal the number of items."""

    @property
    def num_documents(self) -> int:
        """Number of documents; items after the last boundary count as one."""
        return len(self.boundaries) - int(self.boundaries[-1] == len(self.sizes))

    def document_start(self, document: int) -> int:
        """Position of a document's first token; the number of tokens for the index after the last document."""
        item = int(self.boundaries[document]) if document < len(self.boundaries) else len(self.sizes)
        return len(self.tokens) if item == len(self.sizes) else int(self.pointers[item]) // self.tokens.itemsize


def find_binidx(source: str) -> tuple[Path, Path] | None:
    """Finds the .bin and .idx of a source given as either file or their common stem; None if it is neither.

    Raises:
      ConfigError: one of the two is missing.
    """
    path = Path(source).expanduser()
    named = path.suffix in (".bin", ".idx")
    stem = path.with_suffix("") if named else path
    pair = stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx")
    if not named:
        return pair if not path.exists() and all(file.is_file() for file in pair) else None
    for file in pair:
        if not file.is_file():
            raise ConfigError(
                f"data.source = {source!r}: there is no {file}; tokens need a .bin and the .idx beside it"
            )
    return pair


def open_binidx(bin_path: Path, idx_path: Path) -> Binidx:
    """Opens a pair after checking the whole .idx against the size of the .bin, which is not read.

    Raises:
      ConfigError: a file cannot be read, is not an .idx, is cut short, or does not match the other.
    """
    try:
        bin_bytes, idx_bytes = bin_path.stat().st_size, idx_path.stat().st_size
        with idx_path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    with explain_refusal(idx_path, "the .idx that belongs to the .bin", ("tokens",)):
        dtype, num_items, num_boundaries = _parse_header(header, idx_path)
    needed = _HEADER.size + 12 * num_items + 8 * num_boundaries
    if idx_bytes != needed:
        what = "is cut short" if idx_bytes < needed else "is too long"
        raise ConfigError(
            f"{idx_path}: {what}, it has {idx_bytes} bytes and its header announces {needed} ({num_items} items, "
            f"{num_boundaries} document boundaries); copy it again"
        )
    if num_items == 0 or num_boundaries == 0 or bin_bytes == 0:
        raise ConfigError(f"{idx_path}: holds no documents ({num_items} items, {bin_bytes} bytes in {bin_path.name})")
    opened = Binidx(
        bin_path=bin_path,
        idx_path=idx_path,
        tokens=np.memmap(bin_path, dtype, "r", shape=(bin_bytes // dtype.itemsize,)),
        sizes=np.memmap(idx_path, "<i4", "r", _HEADER.size, (num_items,)),
        pointers=np.memmap(idx_path, "<i8", "r", _HEADER.size + 4 * num_items, (num_items,)),
        boundaries=np.memmap(idx_path, "<i8", "r", _HEADER.size + 12 * num_items, (num_boundaries,)),
    )
    # Valid tokens may start like any kind of file, or with zeros.
    might_be_wrong = opened.tokens[:1].any()
    wanted = "the .bin that belongs to the .idx"
    with explain_refusal(bin_path, wanted, get_args(Kind)) if might_be_wrong else contextlib.nullcontext():
        _check_items(opened, bin_bytes)
        _check_boundaries(opened)
    return opened


def evenly_spaced_blocks(num_tokens: int, itemsize: int) -> Iterator[slice]:
    """At most 64 slices of 1 MiB, evenly spaced over the tokens; all tokens if there are fewer."""
    length = _BLOCK_BYTES // itemsize
    if num_tokens <= _MAX_BLOCKS * length:
        yield from (slice(start, min(start + length, num_tokens)) for start in range(0, num_tokens, length))
        return
    for block in range(_MAX_BLOCKS):
        start = block * (num_tokens - length) // (_MAX_BLOCKS - 1)
        yield slice(start, start + length)


def fingerprint(opened: Binidx) -> str:
    """Hex digest of the whole .idx, the size of the .bin and evenly spaced blocks of the .bin.

    At most 64 MiB of the .bin are read, since the Pile's has 664 GB: changes outside these blocks go unnoticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{opened.tokens.nbytes} ".encode())
    with opened.idx_path.open("rb") as file:
        while content := file.read(_DIGEST_BYTES):
            digest.update(content)
    for block in evenly_spaced_blocks(len(opened.tokens), opened.tokens.itemsize):
        digest.update(opened.tokens[block].tobytes())
    return digest.hexdigest()


class BinidxWriter:
    """Writes a pair of files and their digest as a stream; a context manager. They appear when it exits without error.

    Data goes to temporary files beside the target, which are flushed to disk and then renamed, the .idx last. After an
    error nothing is left.
    """

    def __init__(self, target: Path, vocab_size: int) -> None:
        """Opens TARGET.bin and TARGET.idx for writing, in uint16 if the vocabulary allows, else int32.

        Args:
          target: the common stem of both names, or one of them.
          vocab_size: number of ids.

        Raises:
          ConfigError: one of the files exists already, or the folder cannot be written.
        """
        stem = target.with_suffix("") if target.suffix in (".bin", ".idx") else target
        self.paths = stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx")
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._vocab_size = vocab_size
        self._sizes = array.array("i")
        self._size = 0
        self._checksum = 0
        self.num_tokens = 0
        """Tokens written so far."""
        self._refuse_existing()
        self._temporary = [temporary_name(path) for path in self._all_paths]
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._temporary[0].open("xb")
        except OSError as error:
            raise ConfigError(f"{stem.parent}: cannot be written ({error.strerror}); name another folder") from error

    def __enter__(self) -> BinidxWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._sizes)

    def write(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Appends tokens to the current document. Raises ConfigError for a token outside the vocabulary."""
        values = np.asarray(tokens, np.int64)
        if not len(values):
            return
        wrong = first_wrong_token(values, self._vocab_size)
        if wrong is not None:
            raise ConfigError(
                f"document {self.num_documents}: token {values[wrong]} is no id of a vocabulary of {self._vocab_size}"
            )
        content = values.astype(self._dtype).tobytes()
        self._bin.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.num_tokens += len(values)
        self._size += len(values)

    def end_document(self) -> None:
        """Ends the current document, after its end-of-text token. Raises ConfigError if it has 2^31 tokens or more."""
        if self._size > _MAX_ITEM_TOKENS:
            raise ConfigError(
                f"document {self.num_documents}: {self._size} tokens are more than the format can count; divide it"
            )
        self._sizes.append(self._size)
        self._size = 0

    def _finish(self) -> None:
        if self._size:
            raise ConfigError(f"{self.paths[0]}: the last document was not ended; call end_document after each")
        if not self.num_tokens:
            raise ConfigError(f"{self.paths[0]}: there is no document to write")
        flush_to_disk(self._bin)
        with self._temporary[2].open("xb") as idx:
            items = len(self._sizes)
            idx.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], items, items + 1))
            sizes = np.frombuffer(self._sizes, np.intc)
            for start in range(0, items, _BLOCK_ITEMS):
                idx.write(sizes[start : start + _BLOCK_ITEMS].astype("<i4").tobytes())
            position = 0
            for start in range(0, items, _BLOCK_ITEMS):
                ends = position + np.cumsum(sizes[start : start + _BLOCK_ITEMS], dtype=np.int64)
                starts = np.concatenate([[position], ends[:-1]])
                idx.write((starts * self._dtype.itemsize).astype("<i8").tobytes())
                position = int(ends[-1])
            for start in range(0, items + 1, _BLOCK_ITEMS):
                idx.write(np.arange(start, min(start + _BLOCK_ITEMS, items + 1), dtype="<i8").tobytes())
            flush_to_disk(idx)
        written = open_binidx(self._temporary[0], self._temporary[2])
        with self._temporary[1].open("xb") as digest:
            digest.write(digest_content(fingerprint(written), written.tokens.nbytes, self._checksum))
            flush_to_disk(digest)
        self._refuse_existing()  # another process may have written them meanwhile
        renamed: list[Path] = []
        try:
            for temporary, path in zip(self._temporary, self._all_paths, strict=True):
                _rename(temporary, path)
                renamed.append(path)
        except BaseException:
            for path in renamed:
                path.unlink()
            raise
        flush_to_disk(self.paths[0].parent)

    def _refuse_existing(self) -> None:
        for path in self._all_paths:
            refuse_existing(path)

    @property
    def _all_paths(self) -> tuple[Path, Path, Path]:
        """In the order in which they appear."""
        return self.paths[0], digest_path(self.paths[0]), self.paths[1]


def _rename(temporary: Path, path: Path) -> None:
    try:
        atomic_rename(temporary, path)
    except FileExistsError as error:
        raise already_exists(path) from error


def _parse_header(header: bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    if not header.startswith(_MAGIC):
        raise ConfigError(f"{path}: not a token index (.idx): starts with {header[:9]!r} instead of {_MAGIC!r}")
    if len(header) < _HEADER.size:
        raise ConfigError(f"{path}: is cut short, it ends within its header of {_HEADER.size} bytes; copy it again")
    _, version, code, num_items, num_boundaries = _HEADER.unpack(header)
    if version != _VERSION:
        raise ConfigError(f"{path}: has version {version} of the format, and only version {_VERSION} is known")
    if code not in _DTYPES:
        raise ConfigError(f"{path}: has dtype code {code}, and only 1 to 8 are known")
    return _DTYPES[code], num_items, num_boundaries


def _check_items(opened: Binidx, bin_bytes: int) -> None:
    itemsize, end = opened.tokens.itemsize, 0
    for first in range(0, len(opened.sizes), _BLOCK_ITEMS):
        sizes = opened.sizes[first : first + _BLOCK_ITEMS].astype(np.int64) * itemsize
        pointers = opened.pointers[first : first + _BLOCK_ITEMS].astype(np.int64)
        if (sizes < 0).any():
            item = int(np.flatnonzero(sizes < 0)[0])
            raise ConfigError(f"{opened.idx_path}: item {first + item} has {sizes[item] // itemsize} tokens")
        outside = (pointers < 0) | (pointers > bin_bytes - sizes)
        if outside.any():
            item = int(np.flatnonzero(outside)[0])
            raise ConfigError(
                f"{opened.idx_path}: does not match {opened.bin_path.name}, item {first + item} covers the bytes "
                f"{pointers[item]} to {pointers[item] + sizes[item]} of a file of {bin_bytes}"
            )
        starts = end + np.cumsum(sizes) - sizes
        if (pointers != starts).any():
            item = int(np.flatnonzero(pointers != starts)[0])
            raise ConfigError(
                f"{opened.idx_path}: item {first + item} begins at byte {pointers[item]} and the items before it end "
                f"at {starts[item]}; only files whose items follow one another can be read as one stream"
            )
        end = int(starts[-1] + sizes[-1])
    if end != bin_bytes:
        raise ConfigError(
            f"{opened.idx_path}: does not match {opened.bin_path.name}, its items have {end} bytes "
            f"({end // itemsize} tokens of {itemsize}) and the file has {bin_bytes}; are they of the same name and age?"
        )


def _check_boundaries(opened: Binidx) -> None:
    previous = 0
    for first in range(0, len(opened.boundaries), _BLOCK_ITEMS):
        boundaries = opened.boundaries[first : first + _BLOCK_ITEMS].astype(np.int64)
        begins = boundaries[0] == 0 if first == 0 else boundaries[0] >= previous
        if not begins or (np.diff(boundaries) < 0).any() or boundaries[-1] > len(opened.sizes):
            raise ConfigError(
                f"{opened.idx_path}: its document boundaries do not rise from 0 to at most its {len(opened.sizes)} "
                "items; write it again"
            )
        previous = int(boundaries[-1])
