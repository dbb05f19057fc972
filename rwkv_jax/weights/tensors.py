"""Mappings from names to NumPy arrays, memory-mapped or computed, used by readers and writers."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.file_kinds import Kind, describe_wrong_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class WeightsError(ConfigError):
    """Weights that cannot be read, written or used; the message has the file, the problem and the remedy."""


class UnsafeFileError(WeightsError):
    """A file of weights that contains anything but plain tensors; nothing in it was executed."""


class MappedTensors(dict[str, NDArray]):
    """Tensors by name, in the order of the file: read-only views of memory-mapped files, read when they are used."""

    def __init__(self, tensors: Mapping[str, NDArray], maps: Sequence[mmap.mmap]) -> None:
        super().__init__(tensors)
        self._maps = tuple(maps)

    @classmethod
    def joined(cls, parts: Iterable[MappedTensors]) -> MappedTensors:
        """The tensors of several files, with distinct names, as one mapping."""
        whole = cls({}, [])
        for part in parts:
            whole |= part
            whole._maps += part._maps
        return whole

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


def tensor_spec(tensors: Mapping[str, NDArray], name: str) -> TensorSpec:
    """Shape and dtype of a tensor; does not compute `DerivedTensors`."""
    if isinstance(tensors, DerivedTensors):
        return tensors.spec(name)
    tensor = tensors[name]
    return TensorSpec(tensor.shape, tensor.dtype)


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Joins names for a message: the first ones, and the number of others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def describe_wrong_weights(path: Path, reads: Collection[Kind]) -> str | None:
    """Describes a rejected file of weights with the remedy, as `describe_wrong_file`, if recognized."""
    return describe_wrong_file(path, "a .pth or .safetensors file of weights", reads)


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
