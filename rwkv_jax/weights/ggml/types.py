"""How ggml holds a tensor: as plain numbers, or each row as blocks of quantized ones."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import shown
from rwkv_jax.weights.pth.rejection import AGAIN, reject
from rwkv_jax.weights.tensors import BFLOAT16, DerivedTensors, LazyTensor, MappedTensors, TensorSpec, WeightsError

MISSING = 'the package gguf is missing: pip install "rwkv-jax[gguf]"'
"""Said by whoever needs it, after what for."""


class TensorType(NamedTuple):
    """A way to hold numbers."""

    name: str
    """As llama.cpp calls it, in lower case."""
    block: int
    """Numbers of a block; they are neighbors on the last axis."""
    size: int
    """Bytes of a block."""
    dtype: np.dtype[Any] | None
    """Of plain numbers; None for quantized ones."""


_PLAIN = {
    0: ("f32", np.dtype("<f4")),
    1: ("f16", np.dtype("<f2")),
    28: ("f64", np.dtype("<f8")),
    30: ("bf16", BFLOAT16),
}
_BLOCKS = {
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
}

TYPES = {
    **{number: TensorType(name, 1, dtype.itemsize, dtype) for number, (name, dtype) in _PLAIN.items()},
    **{number: TensorType(*fields, None) for number, fields in _BLOCKS.items()},
}
"""By their numbers in a GGUF file."""


class StoredTensor(NamedTuple):
    """A tensor as a file has it."""

    type: TensorType
    shape: tuple[int, ...]
    content: NDArray
    """A view of the file: numbers of this shape, or bytes whose last axis is a row of blocks."""


def stored_tensor(
    mapped: mmap.mmap, name: str, kind: TensorType, shape: tuple[int, ...], start: int, end: int
) -> StoredTensor:
    """The tensor at a position of a file, which is nowhere read.

    Args:
      kind: how it is held.
      start: of its bytes in the file.
      end: where the part of the file ends in which it must lie.

    Raises:
      UnsafeFileError: its rows are no whole blocks, or it does not lie there.
    """
    if shape[-1] % kind.block:
        reject(f"the tensor {shown(name)} has rows of {shape[-1]}, which are not whole blocks of {kind.name}", AGAIN)
    size = num_bytes(kind, shape)
    if start > end or size > end - start:
        reject(f"the tensor {shown(name)} needs {size} bytes at {start}, the file has {end}", AGAIN)
    if kind.dtype is not None:
        return StoredTensor(kind, shape, np.ndarray(shape, kind.dtype, buffer=mapped, offset=start))
    rows = (*shape[:-1], shape[-1] // kind.block * kind.size)
    return StoredTensor(kind, shape, np.ndarray(rows, np.uint8, buffer=mapped, offset=start))


def num_bytes(kind: TensorType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose rows are whole blocks, in whole numbers of any length."""
    return math.prod(shape) // kind.block * kind.size


def mapped_tensors(stored: Mapping[str, StoredTensor], mapped: mmap.mmap) -> MappedTensors:
    """What a file holds, as it holds it."""
    quantized = {name: tensor.type.name for name, tensor in stored.items() if tensor.type.dtype is None}
    return MappedTensors({name: tensor.content for name, tensor in stored.items()}, [mapped], held_in=quantized)


def numbers(stored: Mapping[str, StoredTensor]) -> DerivedTensors:
    """The tensors as numbers: views of the file, or float32 computed from blocks on access, one tensor at a time."""
    return DerivedTensors({name: _numbers(tensor) for name, tensor in stored.items()})


def _numbers(tensor: StoredTensor) -> LazyTensor:
    if tensor.type.dtype is not None:
        return LazyTensor(TensorSpec(tensor.shape, tensor.type.dtype), lambda: tensor.content)
    return LazyTensor(TensorSpec(tensor.shape, np.dtype(np.float32)), lambda: dequantized(tensor))


def dequantized(tensor: StoredTensor) -> NDArray[np.float32]:
    """The numbers of a tensor in blocks, as llama.cpp computes them. Raises WeightsError if gguf is missing."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(f"to compute numbers from {tensor.type.name}, {MISSING}") from error
    kind = gguf.GGMLQuantizationType[tensor.type.name.upper()]
    with np.errstate(all="ignore"):  # scales that are no numbers give numbers that are none
        return gguf.dequantize(tensor.content, kind)
