"""Reads the header of a GGUF file: what its tensors are, where they lie, and what the file says of itself.

Nothing that the file says is trusted before it is checked: counts and lengths are held against the bytes that are left,
and tensors must follow each other without overlap or gap, as llama.cpp wants them, so that each byte has one meaning.
Nothing is allocated by a size that the file claims, and no number of a tensor is read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rwkv_jax.checks import shown
from rwkv_jax.weights.ggml.types import TYPES, StoredTensor, num_bytes, stored_tensor
from rwkv_jax.weights.pth.rejection import AGAIN, reject
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError, describe_wrong_weights, map_file

MAGIC = b"GGUF"

_VERSIONS = (2, 3)  # which differ in what they say of big-endian machines
_MAX_KEYS, _MAX_TENSORS, _MAX_TEXTS = 2**14, 2**20, 2**22
_MAX_KEY_BYTES, _MAX_NAME_BYTES, _MAX_TEXT_BYTES = 2**16 - 1, 63, 2**20
_MAX_DECODED_BYTES = 2**22  # of all names and texts that are read; those of an RWKV take a tenth of it at most
_MAX_AXES = 4
_MAX_ALIGNMENT = 2**16
_DEFAULT_ALIGNMENT = 32

_NUMBERS = {kind: struct.Struct("<" + code) for kind, code in enumerate("BbHhIif")} | {
    kind: struct.Struct("<" + code) for kind, code in ((10, "Q"), (11, "q"), (12, "d"))
}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]
_LEAST_ENTRY = 8 + 4 + 1  # bytes of the shortest entry: an empty key, its type, a number
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # a name of no letters, one axis


class Texts(NamedTuple):
    """An array of texts, of which none has been decoded."""

    count: int
    start: int

    def __repr__(self) -> str:
        return f"an array of {self.count} texts"


class Numbers(NamedTuple):
    """An array of numbers, which are not read."""

    count: int

    def __repr__(self) -> str:
        return f"an array of {self.count} numbers"


Value: TypeAlias = "bool | int | float | str | Texts | Numbers"
"""What a file says under a key."""


class GGUFFile(NamedTuple):
    """What a file holds."""

    metadata: dict[str, Value]
    """By key."""
    tensors: dict[str, StoredTensor]
    """By name, in the order of the file."""
    mapped: mmap.mmap

    def texts(self, key: str) -> Iterator[bytes]:
        """The texts of an array; none if the key has no array of texts."""
        found = self.metadata.get(key)
        if isinstance(found, Texts):
            position = found.start
            for _ in range(found.count):
                (length,) = _U64.unpack_from(self.mapped, position)
                yield self.mapped[position + 8 : position + 8 + length]
                position += 8 + length


def read_gguf(path: Path) -> GGUFFile:
    """The header of a file, and its tensors as views of the memory-mapped file.

    Raises:
      WeightsError: there is no such file, it cannot be read or is empty, it is one part of several, or of a version
        that is not read.
      UnsafeFileError: it contradicts itself, or has types that are not read.
    """
    mapped = map_file(path)
    try:
        return _read(mapped)
    except UnsafeFileError as error:
        wrong = describe_wrong_weights(path, ("other",))
        found = str(error) if wrong is None else f"{str(error).partition(';')[0]}: it {wrong}"
        raise UnsafeFileError(f"{path}: {found}") from None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _read(mapped: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(mapped)
    if mapped[:4] != MAGIC:
        reject("is no GGUF file", AGAIN)
    cursor.position = 4
    _check_version(cursor.number(_U32, "the version"))
    num_tensors, num_keys = (cursor.number(_U64, f"the number of {what}") for what in ("tensors", "keys"))
    cursor.check_count(num_keys, _MAX_KEYS, _LEAST_ENTRY, "keys")
    cursor.check_count(num_tensors, _MAX_TENSORS, _LEAST_TENSOR, "tensors")
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.text(_MAX_KEY_BYTES, "a key")
        if key in metadata:
            reject(f"it has the key {shown(key)} twice", AGAIN)
        metadata[key] = cursor.value(key)
    if isinstance(parts := metadata.get("split.count", 1), int) and parts > 1:
        raise WeightsError(f"is one of {parts} parts; put them together by llama-gguf-split --merge")
    return GGUFFile(metadata, _tensors(cursor, num_tensors, _alignment(metadata)), mapped)


def _check_version(version: int) -> None:
    if version in _VERSIONS:
        return
    if version.to_bytes(4, "little") in [known.to_bytes(4, "big") for known in (1, *_VERSIONS)]:
        raise WeightsError("was written for big-endian machines; convert the original weights anew")
    if version == 1:
        raise WeightsError("is GGUF of version 1, which llama.cpp has given up, too; convert the original weights anew")
    reject(f"is GGUF of version {version}, which is not known; versions 2 and 3 are read")


def _alignment(metadata: dict[str, Value]) -> int:
    found = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(found, int) and 8 <= found <= _MAX_ALIGNMENT and not found & (found - 1):
        return found
    reject(f"general.alignment = {shown(found)}: must be a power of two from 8 to {_MAX_ALIGNMENT}", AGAIN)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, StoredTensor]:
    """The tensors, which must lie one behind the other in the order of the header."""
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.text(_MAX_NAME_BYTES, "the name of a tensor")
        if name in entries:
            reject(f"it has two tensors named {shown(name)}", AGAIN)
        num_axes = cursor.number(_U32, f"the axes of {shown(name)}")
        if not 1 <= num_axes <= _MAX_AXES:
            reject(f"the tensor {shown(name)} has {num_axes} axes; 1 to {_MAX_AXES} are possible", AGAIN)
        shape = tuple(cursor.number(_U64, f"the shape of {shown(name)}") for _ in range(num_axes))[::-1]
        if 0 in shape:
            reject(f"the tensor {shown(name)} has the shape {list(shape)}, which holds nothing", AGAIN)
        kind, offset = (cursor.number(code, f"the place of {shown(name)}") for code in (_U32, _U64))
        entries[name] = (kind, shape, offset)
    start, end = _aligned(cursor.position, alignment), len(cursor.mapped)
    free = 0
    found: dict[str, StoredTensor] = {}
    for name, (kind, shape, offset) in entries.items():
        if kind not in TYPES:
            known = ", ".join(each.name for each in TYPES.values())
            reject(f"the tensor {shown(name)} is of type {kind} of ggml, which is not read", f"quantize to {known}")
        if offset != free:
            reject(f"the tensor {shown(name)} begins at {offset}, and the one before it ends at {free}", AGAIN)
        found[name] = stored_tensor(cursor.mapped, name, TYPES[kind], shape, start + offset, end)
        free = _aligned(offset + num_bytes(TYPES[kind], shape), alignment)
    if end - start > free:
        reject(f"{end - start - free} bytes follow its last tensor", AGAIN)
    return found


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Cursor:
    """Reads one field after the other, each only if it lies within the file."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.position = 0
        self._decoded = 0

    @property
    def left(self) -> int:
        return len(self.mapped) - self.position

    def check_count(self, count: int, limit: int, least: int, what: str) -> None:
        """Refuses a number of things, each of some bytes at least, that the rest of the file cannot hold."""
        if count > limit or count * least > self.left:
            reject(f"it claims {count} {what}, with {self.left} bytes left", AGAIN)

    def number(self, code: struct.Struct, what: str) -> Any:
        if code.size > self.left:
            reject(f"it ends within {what}", AGAIN)
        (value,) = code.unpack_from(self.mapped, self.position)
        self.position += code.size
        return value

    def skip_text(self, limit: int, what: str) -> None:
        """Goes past a text, whose bytes are not looked at."""
        length = self.number(_U64, what)
        if length > min(limit, self.left):
            reject(f"{what} claims {length} bytes, of {self.left} that are left and {limit} that are possible", AGAIN)
        self.position += length

    def text(self, limit: int, what: str) -> str:
        start = self.position + _U64.size
        self.skip_text(limit, what)
        self._decoded += self.position - start
        if self._decoded > _MAX_DECODED_BYTES:
            reject(f"its names and texts take more than {_MAX_DECODED_BYTES} bytes", AGAIN)
        try:
            return self.mapped[start : self.position].decode()
        except UnicodeDecodeError:
            reject(f"{what} is not UTF-8", AGAIN)

    def value(self, key: str) -> Value:
        what = f"the value of {shown(key)}"
        kind = self.number(_U32, what)
        if kind == _TEXT:
            return self.text(_MAX_TEXT_BYTES, what)
        if kind == _ARRAY:
            return self.array(what)
        if kind == _BOOL:
            value = self.number(_NUMBERS[0], what)
            if value > 1:
                reject(f"{what} is neither true nor false", AGAIN)
            return bool(value)
        if kind not in _NUMBERS:
            reject(f"{what} is of type {kind}, which the format does not have", AGAIN)
        return self.number(_NUMBERS[kind], what)

    def array(self, what: str) -> Texts | Numbers:
        kind, count = self.number(_U32, what), self.number(_U64, what)
        if kind == _TEXT:
            self.check_count(count, _MAX_TEXTS, _U64.size, f"texts in {what}")
            start = self.position
            for _ in range(count):
                self.skip_text(_MAX_TEXT_BYTES, what)
            return Texts(count, start)
        if kind == _ARRAY:
            reject(f"{what} has arrays within an array, which no model needs", AGAIN)
        if kind not in _NUMBERS and kind != _BOOL:
            reject(f"{what} is of type {kind}, which the format does not have", AGAIN)
        size = 1 if kind == _BOOL else _NUMBERS[kind].size
        self.check_count(count, len(self.mapped), size, f"numbers in {what}")
        self.position += count * size
        return Numbers(count)
