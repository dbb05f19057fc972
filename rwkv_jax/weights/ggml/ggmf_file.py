"""Reads the header of a ggmf file of rwkv.cpp: tensors one behind the other, each with a header of its own.

As of a GGUF, nothing that the file says is trusted before it is checked, and nothing is allocated by it.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from rwkv_jax.checks import shown
from rwkv_jax.weights.ggml.types import TYPES, StoredTensor, num_bytes, stored_tensor
from rwkv_jax.weights.pth.rejection import AGAIN, reject
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError, map_file

MAGIC = b"fmgg"

_HEADER = struct.Struct("<4s5I")
_TENSOR = struct.Struct("<3I")
_VERSIONS = (100, 101)
_FORMATS = ("f32", "f16", "q4_0", "q4_1", None, None, None, "q5_0", "q5_1", "q8_0")  # by number; None was given up
_MAX_AXES, _MAX_NAME_BYTES, _MAX_TENSORS = 3, 255, 2**20
_BY_NAME = {kind.name: kind for kind in TYPES.values()}


class GGMFFile(NamedTuple):
    """What a file holds."""

    vocab_size: int
    width: int
    num_layers: int
    tensors: dict[str, StoredTensor]
    """By name, in the order of the file."""
    mapped: mmap.mmap


def read_ggmf(path: Path) -> GGMFFile:
    """The header of a file, and its tensors as views of the memory-mapped file.

    Raises:
      WeightsError: there is no such file, it cannot be read, or its blocks are of a format that rwkv.cpp has given up.
      UnsafeFileError: it contradicts itself.
    """
    mapped = map_file(path)
    try:
        return _read(mapped)
    except (UnsafeFileError, WeightsError) as error:
        raise type(error)(f"{path}: {error}") from None


def _read(mapped: mmap.mmap) -> GGMFFile:
    if len(mapped) < _HEADER.size or mapped[:4] != MAGIC:
        reject("is no whole ggmf file", AGAIN)
    _, version, vocab_size, width, num_layers, kind = _HEADER.unpack_from(mapped, 0)
    if version not in _VERSIONS:
        reject(f"is ggmf of version {version}, which is not known; versions 100 and 101 are read", AGAIN)
    _format(kind, "the model", version)
    position, end = _HEADER.size, len(mapped)
    tensors: dict[str, StoredTensor] = {}
    while position < end:
        if len(tensors) == _MAX_TENSORS:
            reject(f"it has more than {_MAX_TENSORS} tensors", AGAIN)
        if _TENSOR.size > end - position:
            reject("it ends within the header of a tensor", AGAIN)
        num_axes, length, kind = _TENSOR.unpack_from(mapped, position)
        position += _TENSOR.size
        if not 1 <= num_axes <= _MAX_AXES:
            reject(f"a tensor has {num_axes} axes; 1 to {_MAX_AXES} are possible", AGAIN)
        if not 1 <= length <= _MAX_NAME_BYTES or 4 * num_axes + length > end - position:
            reject(
                f"the name of a tensor claims {length} bytes, of {end - position} that are left and {_MAX_NAME_BYTES} "
                "that are possible",
                AGAIN,
            )
        shape = struct.unpack_from(f"<{num_axes}I", mapped, position)[::-1]
        position += 4 * num_axes
        try:
            name = mapped[position : position + length].decode()
        except UnicodeDecodeError:
            reject("the name of a tensor is not UTF-8", AGAIN)
        position += length
        if name in tensors:
            reject(f"it has two tensors named {shown(name)}", AGAIN)
        if 0 in shape:
            reject(f"the tensor {shown(name)} has the shape {list(shape)}, which holds nothing", AGAIN)
        held = _BY_NAME[_format(kind, f"the tensor {shown(name)}", version)]
        tensors[name] = stored_tensor(mapped, name, held, shape, position, end)
        position += num_bytes(held, shape)
    return GGMFFile(vocab_size, width, num_layers, tensors, mapped)


def _format(kind: int, what: str, version: int) -> str:
    name = _FORMATS[kind] if kind < len(_FORMATS) else None
    if name is None:
        reject(f"{what} is of type {kind}, which is not read", "convert the original weights anew")
    if name[0] == "q" and version == _VERSIONS[0]:
        raise WeightsError(
            f"{what} is of {name} as before May 2023, which rwkv.cpp does not read either; convert the original "
            "weights anew"
        )
    return name
