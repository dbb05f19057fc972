"""Weights in 8 or 4 bits: which parameters are packed, how, and how they are stored in files.

Matrices are packed: embedding, head and linear maps. Vectors and norms stay in float32, and so do low-rank maps with a
rank of at most a twelfth of the width, including the decay's: they are a hundredth of a model. In narrow models, where
ranks are not low, those of time mixings are packed too, the decay's with at least 8 bits: its errors accumulate
over a text.

int8 has a scale for each output channel. int4 has groups of 32 inputs with a multiplier and an offset each, small
integers in units of the channel's scale, so that 4.5 bits of a number are kept and unpacking gives whole numbers in 8
bits (`rwkv_jax.models.packed`). Files are safetensors, in which a packed tensor NAME is NAME.int8 or NAME.int4, and
beside it NAME.scale, NAME.multiplier, NAME.offset.
"""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.generations import is_low_rank
from rwkv_jax.models import abstract_model
from rwkv_jax.models.packed import GROUP_SIZE, Int4Matrix, Int8Matrix, PackedMatrix
from rwkv_jax.models.stacks import is_stack
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.weights.official import check_tensors, fetched, official_names, official_shapes, require_official_names
from rwkv_jax.weights.tensors import (
    BFLOAT16,
    DerivedTensors,
    LazyTensor,
    MappedTensors,
    TensorSpec,
    WeightsError,
    join_names,
    tensor_spec,
)

Quantization = Literal["int8", "int4", "bfloat16"]
"""The number format of a model's matrices."""

QUANTIZATIONS: tuple[Quantization, ...] = typing.get_args(Quantization)

PackedParts = dict[str, NDArray]
"""A packed matrix, or several layers' with a leading axis: `codes`, `scale` and in 4 bits `multiplier` and `offset`."""

_PACKED = re.compile(r"(?P<name>.+)\.(?P<kind>int8|int4)")
_SMALL_RANK = 12  # the width is as many ranks or more
_CODES_OF_4_BITS = 15
_LARGEST = 127
_LARGEST_SCALE = np.finfo(np.float32).max / (_LARGEST + 1)
_LARGEST_MULTIPLIER = 17  # 15 steps of 17 reach from -128 to 127
_ROWS_AT_A_TIME = 2**21  # numbers packed at a time, since packing needs a multiple of their memory


def quantization_of(name: str, shape: tuple[int, ...], wanted: Quantization) -> Quantization | None:
    """The number format of a tensor, by its official name and shape; None is float32.

    A matrix whose inputs do not divide into groups of 32 has 8 bits in place of 4.
    """
    if is_transposed(name):
        if _SMALL_RANK * min(shape[-2:]) <= max(shape[-2:]):
            return None
    elif not (name.endswith(".weight") and len(shape) == 2):
        return None
    num_inputs = shape[-2] if is_transposed(name) else shape[-1]
    if wanted == "int4" and (num_inputs % GROUP_SIZE or is_low_rank(name, decay_only=True)):
        return "int8"
    return wanted


def packed_bytes(config: ModelConfig, wanted: Quantization) -> int:
    """Bytes of a model's parameters with its matrices in a format, in closed form."""
    total = 0
    for name, shape in official_shapes(config).items():
        size, num_outputs = math.prod(shape), shape[-1] if is_transposed(name) else shape[0]
        total += {
            "int8": size + 4 * num_outputs,
            "int4": size // 2 + 4 * num_outputs + 2 * (size // GROUP_SIZE),
            "bfloat16": 2 * size,
            None: 4 * size,
        }[quantization_of(name, shape, wanted)]
    return total


def is_transposed(name: str) -> bool:
    """Whether a packed parameter is [in, out]: low-rank maps are, linear maps are [out, in]."""
    return is_low_rank(name)


def pack(matrix: NDArray, quantization: Quantization) -> PackedParts:
    """The parts of a matrix [..., out, in] in 8 or 4 bits.

    Raises:
      WeightsError: a number is not finite.
    """
    *leading, num_inputs = matrix.shape
    rows = matrix.reshape(-1, num_inputs)
    pack_rows = {"int8": _pack_int8, "int4": _pack_int4}[quantization]
    size = max(1, _ROWS_AT_A_TIME // num_inputs)
    pieces = [pack_rows(rows[i : i + size].astype(np.float32)) for i in range(0, len(rows), size)]
    joined = {part: np.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}
    return {part: values.reshape(*leading, *values.shape[1:]) for part, values in joined.items()}


def _unit(rows: NDArray) -> NDArray:
    """float32 [rows]: a row's largest number is 127 units."""
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise WeightsError("has numbers that are not finite, which integers cannot hold; load it without quantize")
    # (The smallest normal number: of less, 1 / 127 would lose digits.)
    return np.maximum(largest / _LARGEST, np.finfo(np.float32).tiny).astype(np.float32)


def _pack_int8(rows: NDArray) -> PackedParts:
    unit = _unit(rows)
    return {"codes": np.rint(rows / unit[:, None]).astype(np.int8), "scale": unit}


def _pack_int4(rows: NDArray) -> PackedParts:
    """Each group's multiplier and offset are the pair with the smallest squared error among some near its range."""
    unit = _unit(rows)
    groups = rearrange(rows / unit[:, None], "out (group code) -> out group code", code=GROUP_SIZE)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    exact = (high - low) / _CODES_OF_4_BITS
    error = np.full(exact.shape, np.inf, np.float32)
    multiplier, offset = np.ones(exact.shape, np.int8), np.zeros(exact.shape, np.int8)
    # A step finer than the range asks for cuts off its ends, and is often the better one.
    for step in (np.ceil(exact), np.floor(exact), np.floor(exact) - 1):
        step = np.clip(step, 1, _LARGEST_MULTIPLIER).astype(np.float32)
        # The rest, positive or negative, is split between both ends.
        start = np.rint((low + high - _CODES_OF_4_BITS * step) / 2)
        start = np.clip(start, -_LARGEST - 1, _LARGEST - _CODES_OF_4_BITS * step).astype(np.float32)
        codes = np.clip(np.rint((groups - start[..., None]) / step[..., None]), 0, _CODES_OF_4_BITS)
        found = np.square(groups - start[..., None] - step[..., None] * codes).sum(axis=-1)
        better = found < error
        error = np.where(better, found, error)
        multiplier, offset = np.where(better, step, multiplier), np.where(better, start, offset)
    codes = np.rint((groups - offset[..., None]) / multiplier[..., None])
    codes = np.clip(codes, 0, _CODES_OF_4_BITS).astype(np.uint8)
    half = GROUP_SIZE // 2
    return {
        "codes": codes[..., :half] | codes[..., half:] << 4,
        "scale": unit,
        "multiplier": multiplier.astype(np.int8),
        "offset": offset.astype(np.int8),
    }


def packed_matrix(parts: Mapping[str, Any], *, transposed: bool) -> PackedMatrix:
    """The value of a parameter from its parts, arrays of NumPy or JAX."""
    kind = Int4Matrix if "multiplier" in parts else Int8Matrix
    return kind(**parts, transposed=transposed)


class DequantizedTensors(DerivedTensors):
    """The tensors of a file with packed ones, dequantized to float32 on access, under official names.

    Raises WeightsError on construction for packed tensors with missing or mismatched parts.
    """

    def __init__(self, tensors: Mapping[str, NDArray]) -> None:
        self._file = tensors
        if isinstance(tensors, MappedTensors):
            tensors.verify(tensors.headers)
        self._kinds: dict[str, Quantization | None] = {}
        parts: set[str] = set()
        for file_name in tensors:
            if match := _PACKED.fullmatch(file_name):
                name, kind = match["name"], typing.cast(Quantization, match["kind"])
                if name in self._kinds or name in tensors:
                    raise WeightsError(f"{name} is there twice, in several forms; get the file again")
                self._kinds[name] = kind
                parts.update(_part_names(name, kind).values())
        missing = sorted(parts - set(tensors))
        if missing:
            raise WeightsError(f"parts of packed tensors are missing: {join_names(missing)}; get the file again")
        for name, kind in self._kinds.items():
            self._check(name, typing.cast(Quantization, kind))
        self._kinds |= {name: None for name in tensors if name not in parts}
        super().__init__(
            {name: LazyTensor(self._spec(name), functools.partial(self._dequantized, name)) for name in self._kinds}
        )

    def _dequantized(self, name: str) -> NDArray:
        parts = self.parts(name)
        if parts is None:
            self._verify([name])
            return self._file[name]
        whole = _integers(parts).astype(np.float32)
        whole *= parts["scale"][..., None]
        return np.swapaxes(whole, -1, -2) if is_transposed(name) else whole

    def _spec(self, name: str) -> TensorSpec:
        kind = self._kinds[name]
        if kind is None:
            return tensor_spec(self._file, name)
        shape = tensor_spec(self._file, f"{name}.{kind}").shape
        own = shape if kind == "int8" else (*shape[:-2], shape[-2] * GROUP_SIZE)
        if is_transposed(name):
            own = (*own[:-2], own[-1], own[-2])
        return TensorSpec(own, np.dtype(np.float32))

    def parts(self, name: str) -> PackedParts | None:
        """The parts of a packed tensor as stored in the file, verified; None if it is not packed.

        Raises:
          WeightsError: bytes that differ from the file's checksums, or numbers that `pack` does not make: of some the
            products would not be those of any matrix.
        """
        kind = self._kinds[name]
        if kind is None:
            return None
        self._verify(_part_names(name, kind).values())
        parts = {part: self._file[file_name] for part, file_name in _part_names(name, kind).items()}
        _check_numbers(name, parts)
        return parts

    def _verify(self, names: Iterable[str]) -> None:
        """Compares tensors of a file that has checksums with them."""
        if isinstance(self._file, MappedTensors):
            self._file.verify(names)

    def kind(self, name: str) -> Quantization | None:
        """The number format of a packed tensor; None for one that is not packed."""
        return self._kinds[name]

    @property
    def quantization(self) -> Quantization | None:
        """What the file was quantized to; None for one without packed tensors."""
        kinds = set(self._kinds.values())
        return "int4" if "int4" in kinds else "int8" if "int8" in kinds else None

    def _check(self, name: str, kind: Quantization) -> None:
        found = {part: tensor_spec(self._file, file_name) for part, file_name in _part_names(name, kind).items()}
        codes = found["codes"].shape
        wanted = (
            {"codes": (codes, "int8"), "scale": (codes[:-1], "float32")}
            if kind == "int8"
            else {
                "codes": ((*codes[:-1], GROUP_SIZE // 2), "uint8"),
                "scale": (codes[:-2], "float32"),
                "multiplier": (codes[:-1], "int8"),
                "offset": (codes[:-1], "int8"),
            }
        )
        for part, (shape, dtype) in wanted.items():
            if found[part] != TensorSpec(shape, np.dtype(dtype)) or len(found["scale"].shape) < 1:
                raise WeightsError(
                    f"{_part_names(name, kind)[part]} is {found[part].dtype} {list(found[part].shape)}, must be "
                    f"{dtype} {list(shape)}; get the file again"
                )


def _check_numbers(name: str, parts: PackedParts) -> None:
    if not (np.abs(parts["scale"]) <= _LARGEST_SCALE).all():
        raise WeightsError(
            f"{name}.scale has numbers that are not finite, or too large for those they scale; get the file again"
        )
    if "multiplier" not in parts:
        return
    multiplier, offset = (parts[part].astype(np.int16) for part in ("multiplier", "offset"))
    if multiplier.size and not 1 <= multiplier.min() <= multiplier.max() <= _LARGEST_MULTIPLIER:
        raise WeightsError(
            f"{name}.multiplier has numbers from {multiplier.min()} to {multiplier.max()}, must be from 1 to "
            f"{_LARGEST_MULTIPLIER}; get the file again"
        )
    if (offset + _CODES_OF_4_BITS * multiplier > _LARGEST).any():
        raise WeightsError(
            f"{name}.offset has numbers with which codes unpack to more than {_LARGEST}, the largest of 8 bits; get "
            "the file again"
        )


def _part_names(name: str, kind: Quantization) -> dict[str, str]:
    """The names in a file of a packed tensor's parts."""
    parts = {"codes": f"{name}.{kind}", "scale": f"{name}.scale"}
    return parts if kind == "int8" else parts | {part: f"{name}.{part}" for part in ("multiplier", "offset")}


def _integers(parts: PackedParts) -> NDArray:
    """int8 [..., out, in] in units of the scale."""
    codes = parts["codes"]
    if "multiplier" not in parts:
        return codes
    unpacked = np.concatenate([codes & _CODES_OF_4_BITS, codes >> 4], axis=-1).astype(np.int8)
    unpacked = unpacked * parts["multiplier"][..., None] + parts["offset"][..., None]
    return rearrange(unpacked, "... group code -> ... (group code)")


def open_packed(tensors: Mapping[str, NDArray]) -> DequantizedTensors | None:
    """A file's tensors, dequantized, if some of them are packed; otherwise None."""
    return DequantizedTensors(tensors) if any(_PACKED.fullmatch(name) for name in tensors) else None


def place_quantized_params(
    tensors: Mapping[str, NDArray],
    config: ModelConfig,
    quantization: Quantization,
    drop_pages: Callable[[], None] = lambda: None,
) -> Any:
    """Builds our parameter tree from official tensors, with matrices packed, on the first device.

    Args:
      tensors: checked by `check_tensors`; packed ones are used unchanged, except those that a model has in float32.
      drop_pages: frees the memory of pages read; called after each tensor.

    Raises:
      WeightsError: a number is not finite, or the file is packed in another format.
    """
    device = default_device()

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> Any:
        stacked = is_stack(str(path[0].key))
        names = official_names(path, config.num_layers)
        own = like.shape[1:] if stacked else like.shape
        kind = quantization_of(names[0], own, quantization)
        parts: PackedParts = {}
        for layer, name in enumerate(names):
            for part, values in _held(tensors, name, kind).items():
                if layer == 0:
                    parts[part] = np.empty((len(names), *values.shape), values.dtype)
                parts[part][layer] = values
            drop_pages()
        placed = jax.device_put(parts if stacked else {part: values[0] for part, values in parts.items()}, device)
        return (
            placed["codes"] if kind in (None, "bfloat16") else packed_matrix(placed, transposed=is_transposed(names[0]))
        )

    return jax.tree.map_with_path(leaf, abstract_model(config)[1])


def _held(tensors: Mapping[str, NDArray], name: str, kind: Quantization | None) -> PackedParts:
    """The parts of one tensor as a model holds it; one that is not packed is all `codes`."""
    if kind in (None, "bfloat16"):
        return {"codes": tensors[name].astype(np.float32 if kind is None else BFLOAT16, copy=False)}
    if isinstance(tensors, DequantizedTensors) and (present := tensors.parts(name)) is not None:
        if tensors.kind(name) != kind:
            raise WeightsError(f"{name}: the file has it in {tensors.kind(name)} instead of {kind}; get the file again")
        return present
    tensor = tensors[name]
    try:
        return pack(np.swapaxes(tensor, -1, -2) if is_transposed(name) else tensor, kind)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from error


def packed_tensors(config: ModelConfig, params: Any) -> DerivedTensors:
    """The tensors of a file of packed weights, of a model's parameters, fetched from the device on access.

    Raises WeightsError for a model that has no official names, and parameters that are not those of the config's model.
    """
    require_official_names(config)
    tensors: dict[str, dict[str, LazyTensor]] = {}
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_packed):
        stacked = is_stack(str(path[0].key))
        for layer, name in enumerate(official_names(path, config.num_layers)):
            parts: dict[str, Any] = {name: leaf}
            if _is_packed(leaf):
                names = _part_names(name, "int4" if isinstance(leaf, Int4Matrix) else "int8")
                parts = {file_name: getattr(leaf, part) for part, file_name in names.items()}
            tensors[name] = {part: fetched(array, layer if stacked else None) for part, array in parts.items()}
    shapes = official_shapes(config)
    if tensors.keys() != shapes.keys():
        raise WeightsError(f"parameters differ from the model's: {join_names(sorted(tensors.keys() ^ shapes.keys()))}")
    found = DerivedTensors({part: tensor for name in shapes for part, tensor in tensors[name].items()})
    check_tensors(DequantizedTensors(found), config)  # the user may have changed the model
    return found


def has_packed(params: Any) -> bool:
    """Whether some parameters are packed."""
    return any(_is_packed(leaf) for leaf in jax.tree.leaves(params, is_leaf=_is_packed))


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedMatrix)
