"""PyTorch's .pth files of tensors, read and written without PyTorch, and read without unpickling.

Such a file is a zip of uncompressed entries. `NAME/data.pkl` is a pickle of the dict of tensors; each tensor is in it
as a reference to an entry `NAME/data/KEY`, which holds its numbers, with shape, strides and offset. A pickle is a
program that may call anything, and weights come from strangers: `zip` finds the entries, `pickle` builds
the dict, and both refuse whatever is not as torch writes it. What is left to do here is to say which of the dict's
values are the tensors and that the others are plain. The writer trusts its caller: tensors and names are the user's.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.atomic import new_file
from rwkv_jax.weights.pth.pickle import STORAGES, kind_of, read_pickle
from rwkv_jax.weights.pth.rejection import reject
from rwkv_jax.weights.pth.zip import LOCAL_HEADER, read_entries
from rwkv_jax.weights.shards import is_index, read_shards
from rwkv_jax.weights.tensors import (
    MappedTensors,
    Recorded,
    UnsafeFileError,
    WeightsError,
    describe_wrong_weights,
    map_file,
)

Plain: TypeAlias = "bool | int | float | str | list[Plain] | tuple[Plain, ...] | dict[str, Plain] | None"
"""A value that is not a tensor, all the way down."""

_MAX_PLAIN_DEPTH = 16
_MAX_PLAIN_VALUES = 2**20
_MAX_REPEATS = 16  # of a file's bytes in its tensors: tied ones share bytes, and each is as large as both once copied

_WRAPPERS = ("module", "state_dict", "model")
_ALIGNMENT = 64
_ZIP64_BYTES = 2**30  # below where zipfile would begin with it by itself


class TorchFile(NamedTuple):
    """What a .pth file holds."""

    tensors: MappedTensors
    """By name, in the order of the file."""
    values: dict[str, Plain]
    """What else stands beside the tensors; the files that the `rwkv` package converts have `_strategy` there."""


def read_torch_file(path: Path) -> TorchFile:
    """The tensors of a file by `torch.save`, memory-mapped: nothing is copied, and nothing in the file is run.

    The file is a dict of tensors or of parameters by name, in any of torch's formats since 1.6, of the dtypes bfloat16,
    float16, float32, float64, float8_e4m3fn, float8_e5m2, bool and the integers. A tensor has the strides that it was
    saved with, and tied ones share memory. Where no tensor is at the top, the dict named "module", "state_dict" or
    "model" there is taken, in which DeepSpeed and Lightning wrap theirs; the values beside that dict are checked to be
    plain and left out.
    Checksums are compared by `MappedTensors.verify` only, for that reads the whole file; torch does not. An index
    (`*.bin.index.json`) stands for all of its shards.

    Raises:
      WeightsError: there is no such file, it cannot be read or is empty, or there are no tensors in it.
      UnsafeFileError: it is not such a file, it is damaged, or anything else is in it.
    """
    if is_index(path.name):
        return _read_shards(path)
    mapped = map_file(path)
    try:
        entries = read_entries(mapped)
        tensors, values = _split(read_pickle(mapped, entries), entries["data.pkl"].size)
        if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_REPEATS * len(mapped):
            reject(f"its tensors would take more than {_MAX_REPEATS} times the file once copied")
    except UnsafeFileError as error:
        wrong = describe_wrong_weights(path, ("torch", "zip", "pickle"))
        found = str(error) if wrong is None else f"{str(error).partition(';')[0]}: it {wrong}"
        raise UnsafeFileError(f"{path}: {found}") from None
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors; name a file of weights")
    content = np.frombuffer(mapped, np.uint8)
    recorded = {
        f"the entry {name} of {path.name}": Recorded(content[entry.start : entry.stop], entry.checksum)
        for name, entry in entries.items()
        if entry.checksum or entry.size == 0  # torch can be told to leave them out
    }
    return TorchFile(MappedTensors(tensors, [mapped], recorded), values)


def _read_shards(path: Path) -> TorchFile:
    values: dict[str, Plain] = {}

    def read(shard: Path) -> MappedTensors:
        found = read_torch_file(shard)
        values.update(found.values)
        return found.tensors

    return TorchFile(read_shards(path, read), values)


def _split(state: dict[str, Any], limit: int) -> tuple[dict[str, NDArray], dict[str, Plain]]:
    """The tensors of a state dict, unwrapped if need be, and the other values beside them: `limit` of these at most."""
    if not _holds_tensors(state):
        wrappers = [name for name in _WRAPPERS if _holds_tensors(state.get(name))]
        if len(wrappers) > 1:
            reject(f"it has tensors in both {wrappers[0]!r} and {wrappers[1]!r}")
        if wrappers:
            _plain_values({name: value for name, value in state.items() if name != wrappers[0]}, limit)
            state = state[wrappers[0]]
    tensors = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    return tensors, _plain_values({name: value for name, value in state.items() if name not in tensors}, limit)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, np.ndarray) for item in value.values())


def _plain_values(values: dict[str, Any], limit: int) -> dict[str, Plain]:
    """Copies that share nothing: what a few steps nest a billion times is refused here, not where it is printed."""
    left = min(limit, _MAX_PLAIN_VALUES)

    def copied(value: Any, depth: int) -> Plain:
        nonlocal left
        left -= 1
        if depth > _MAX_PLAIN_DEPTH or left < 0:
            reject(f"the values beside its tensors are nested deeper than {_MAX_PLAIN_DEPTH} or too many")
        match value:
            case None | bool() | int() | float() | str():
                return value
            case list():
                return [copied(item, depth + 1) for item in value]
            case tuple():
                return tuple(copied(item, depth + 1) for item in value)
            case dict():
                return {name: copied(item, depth + 1) for name, item in value.items()}
        reject(f"it has a {kind_of(value)} within the values beside its tensors")

    return {name: copied(value, 0) for name, value in values.items()}


# Writing


def write_torch_file(path: Path, tensors: Mapping[str, NDArray]) -> None:
    """Writes a file that `torch.load` of 1.13 and later reads, with `weights_only=True` and `mmap=True` too.

    It appears whole or not at all, and never in the place of another. Each tensor is asked for once and written before
    the next, so a mapping that makes them as they are asked for takes the memory of one. The same tensors give the same
    bytes. Tied tensors are written once for each name.

    Raises:
      WeightsError: the file exists or cannot be written, there are no tensors, or one has a dtype other than bfloat16,
        float16, float32, float64, bool, uint8, int8, int16, int32 and int64.
    """
    storages = {dtype.name: name for name, dtype in STORAGES.items()}
    pickled = [b"\x80\x02}"]
    with new_file(path, WeightsError) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # as on Linux, so that the bytes are the same on each system
            size = entry.file_size = len(content)
            zip64 = size > _ZIP64_BYTES
            header = LOCAL_HEADER.size + len(entry.filename.encode()) + (20 if zip64 else 0)
            padding = -(file.tell() + header + 4) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            with archive.open(entry, "w", force_zip64=zip64) as target:
                target.write(content)

        for key, name in enumerate(tensors):
            tensor = tensors[name]
            storage = storages.get(tensor.dtype.name)
            if storage is None:
                raise WeightsError(
                    f"{path}: {name!r} is {tensor.dtype}, which not every torch can read; convert it to one of "
                    f"{', '.join(storages)}"
                )
            pickled.append(_pickled_tensor(path, name, storage, str(key), tensor.shape))
            flat = np.ascontiguousarray(tensor, STORAGES[storage]).reshape(-1).view(np.uint8)
            write(f"data/{key}", flat.data)
            del tensor, flat
        if len(pickled) == 1:
            raise WeightsError(f"{path}: there are no tensors to write")
        write("data.pkl", b"".join([*pickled, b"."]))
        write("byteorder", b"little")
        write("version", b"3\n")


def _pickled_tensor(path: Path, name: str, storage: str, key: str, shape: tuple[int, ...]) -> bytes:
    """The steps that put one contiguous tensor into the dict."""
    try:
        text = _pickled_text(name)
    except UnicodeEncodeError as error:
        raise WeightsError(f"{path}: the name {name!r} cannot be written as UTF-8; rename the tensor") from error
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return b"".join(
        [
            text,
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _pickled_text("storage"),
            b"ctorch\n" + storage.encode() + b"\n",
            _pickled_text(key),
            _pickled_text("cpu"),
            *_pickled_integers((math.prod(shape),)),
            b"tQ",
            *_pickled_integers((0,)),
            b"(",
            *_pickled_integers(shape),
            b"t(",
            *_pickled_integers(strides),
            b"t\x89ccollections\nOrderedDict\n)RtRs",
        ]
    )


def _pickled_text(text: str) -> bytes:
    content = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(content)) + content


def _pickled_integers(numbers: tuple[int, ...]) -> Iterator[bytes]:
    for number in numbers:
        yield b"J" + struct.pack("<i", number) if number < 2**31 else b"\x8a\x08" + struct.pack("<q", number)
