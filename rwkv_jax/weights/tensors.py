"""Mappings from names to NumPy arrays, memory-mapped or computed, used by readers and writers."""

from __future__ import annotations

import contextlib
import math
import mmap
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.file_kinds import Kind, describe_wrong_file
from rwkv_jax.weights.content_hash import ContentHash, content_sha256, hash_or_none

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class WeightsError(ConfigError):
    """Weights that cannot be read, written or used; the message has the file, the problem and the remedy."""


class UnsafeFileError(WeightsError):
    """A file of weights that contains anything but plain tensors; nothing in it was executed."""


class Recorded(NamedTuple):
    """Bytes of a file, and the CRC-32 that the file has of them."""

    content: NDArray
    checksum: int


class MappedTensors(dict[str, NDArray]):
    """Tensors by name, in the order of the file: read-only views of memory-mapped files, read when they are used.

    Args:
      recorded: checksums of what a file has some of, by what messages call it: the names of tensors, or entries.
      metadata: what the file says of itself, without its checksums.
      held_in: how a file holds tensors of which these are only the bytes, such as q8_0, by their names.
      contents: hashes of the tensors of each file, where files have some.
    """

    content_sha256: str | None
    """The hash that a file, or the index of several, has of all these tensors; it was not compared."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray],
        maps: Sequence[mmap.mmap],
        recorded: Mapping[str, Recorded] | None = None,
        metadata: Mapping[str, str] | None = None,
        held_in: Mapping[str, str] | None = None,
        contents: Sequence[ContentHash] = (),
    ) -> None:
        super().__init__(tensors)
        self._held_in = dict(held_in or {})
        self._maps = tuple(maps)
        self._recorded = dict(recorded or {})
        self.metadata = dict(metadata or {})
        self._contents = tuple(contents)
        self.content_sha256 = hash_or_none(self._contents[0].recorded) if len(self._contents) == 1 else None

    @classmethod
    def joined(cls, parts: Iterable[MappedTensors], recorded: str | None = None, place: str = "") -> MappedTensors:
        """The tensors of several files, with distinct names, as one mapping.

        Args:
          recorded: the hash that their index, which messages call `place`, has of all of them.
        """
        whole = cls({}, [])
        for part in parts:
            whole |= part
            whole._maps += part._maps
            whole._recorded |= part._recorded
            whole._held_in |= part._held_in
            whole.metadata |= part.metadata
            whole._contents += part._contents
        if recorded is not None:
            files = whole._contents
            whole._contents += (ContentHash(place, recorded, lambda: [x for each in files for x in each.lines()]),)
        whole.content_sha256 = hash_or_none(recorded)
        return whole

    def renamed(self, names: Mapping[str, str]) -> MappedTensors:
        """Some of the tensors under other names, from the names that they have; without checksums."""
        held = {new: self._held_in[old] for old, new in names.items() if old in self._held_in}
        tensors = {new: self[old] for old, new in names.items()}
        return MappedTensors(tensors, self._maps, metadata=self.metadata, held_in=held)

    def held_in(self, name: str) -> str:
        """What the file holds a tensor in: a dtype, or a format of quantized blocks."""
        return self._held_in.get(name) or self[name].dtype.name

    @property
    def has_checksums(self) -> bool:
        """Whether the files have checksums of what they hold."""
        return bool(self._recorded) or any(content.recorded is not None for content in self._contents)

    @property
    def headers(self) -> list[str]:
        """What else than tensors has a checksum."""
        return [name for name in self._recorded if name not in self]

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares bytes with their checksums: of the names that have one, by default all and the hashes of files, too.

        Raises:
          WeightsError: some differ.
        """
        for name in self._recorded if names is None else names:
            found = self._recorded.get(name)
            if found is not None and checksum_of(found.content) != found.checksum:
                raise WeightsError(f"{name} is damaged, it differs from its checksum; get the file again")
        for content in self._contents if names is None else ():
            if content.recorded is not None and content_sha256(content.lines()) != content.recorded:
                raise WeightsError(
                    f"{content.place} has other tensors than those that it has the SHA-256 of; get the file again"
                )

    def drop_pages(self) -> None:
        """Drops the pages read so far from memory; tensors stay usable and are read again on access."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensor(NamedTuple):
    """A tensor that is computed, or fetched from a device, when it is used."""

    spec: TensorSpec
    make: Callable[[], NDArray]


class DerivedTensors(Mapping[str, NDArray]):
    """Tensors computed or fetched from a device on access; specs are known without access."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> NDArray:
        return self._tensors[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor; reads nothing."""
        return self._tensors[name].spec


def checksum_of(tensor: NDArray) -> int:
    """CRC-32 of a tensor's bytes: finds damage, not forgery."""
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def tensor_spec(tensors: Mapping[str, NDArray], name: str) -> TensorSpec:
    """Shape and dtype of a tensor; does not compute `DerivedTensors`."""
    if isinstance(tensors, DerivedTensors):
        return tensors.spec(name)
    tensor = tensors[name]
    return TensorSpec(tensor.shape, tensor.dtype)


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Joins names for a message: the first ones, long and unprintable ones quoted, and the number of others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (
        ", ".join(name if name.isprintable() and len(name) <= 200 else repr(name[:200]) for name in names[:most]) + more
    )


def describe_wrong_weights(path: Path, reads: Collection[Kind]) -> str | None:
    """Describes a rejected file of weights with the remedy, as `describe_wrong_file`, if recognized."""
    return describe_wrong_file(path, "a .pth, .safetensors or .gguf file of weights", reads)


@contextlib.contextmanager
def prefix_errors(path: object) -> Iterator[None]:
    """Prefixes errors about weights with the path of the file or run."""
    try:
        yield
    except WeightsError as error:
        raise type(error)(f"{path}: {error}") from error


def map_file(path: Path) -> mmap.mmap:
    """A whole file, memory-mapped for reading.

    Raises:
      WeightsError: there is no such file, it cannot be read, or it is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise WeightsError(f"{path}: cannot be read ({reason}); name a file of weights") from error
