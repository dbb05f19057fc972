"""Weight matrices quantized to 8 or 4 bits, and their products with float activations.

A packed matrix is a pytree that replaces a parameter's array; `linear` and `Embedding` handle it, so the models do not
change. On CPUs a product of few rows never materializes the matrix in floating point.

On GPUs and TPUs the integers are converted right before a floating-point product. Whether XLA fuses the two, so that
the converted matrix is never in memory, has not been measured there. XLA's CPU backend does not: it writes the
converted matrix to memory at every call. What it runs well, vectorized and on all threads, is int8 x int8 -> int32. So
on CPUs each row of activations is split into three int8 rows (`split_rows`), whose products are exact, and their
weighted sum is the float32 product up to float32 rounding. With few rows, reading the weights takes the time, so three
rows cost as much as one. With many rows arithmetic does, and which is faster, three times the rows in int8 or the
converted matrix, depends on the processor (`ManyRows`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from typing_extensions import override

GROUP_SIZE = 32
"""Consecutive inputs that share a multiplier and an offset, in 4 bits."""

NUM_DIGITS = 3
_DIGIT_BASE = 254  # a remainder of half a unit is 127 units of the next digit

ManyRows = Literal["digits", "converted"]
"""How a CPU multiplies many rows: by int8 digits, or by the matrix converted to float32."""

_FEW_ROWS = 16  # of x: up to here reading the matrix takes the time
_TILE_ELEMENTS = 2**19  # of a 4-bit matrix, unpacked at a time: as bytes they fit a core's cache


@dataclasses.dataclass(frozen=True)
class PackedMatrix(abc.ABC):
    """Integers with a scale per output channel, in place of a matrix; leading axes are those of stacked layers.

    Stored as [out, in]; `transposed` means that the parameter it replaces is [in, out].
    """

    codes: Array
    """The integers as stored."""
    scale: Array
    """float32 [..., out]."""
    transposed: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    many_rows: ManyRows = dataclasses.field(default="digits", kw_only=True, metadata={"static": True})
    """The form on a CPU; `inference/product_form.py` measures which is the faster."""

    @property
    @abc.abstractmethod
    def num_inputs(self) -> int:
        """Size of the input axis."""

    @abc.abstractmethod
    def integers(self) -> Array:
        """The matrix in units of `scale`: int8 [..., out, in]."""

    @abc.abstractmethod
    def times(self, x: Array) -> Array:
        """x [rows, in] @ matrix^T for a single matrix (no leading axes): float32 [rows, out]."""

    def is_converted_for(self, x: Array) -> bool:
        """Whether a CPU converts the matrix to float32 for a product with x [rows, in]."""
        return self.many_rows == "converted" and x.shape[0] > _FEW_ROWS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter it replaces."""
        *leading, out = self.scale.shape
        own = (self.num_inputs, out) if self.transposed else (out, self.num_inputs)
        return (*leading, *own)

    @property
    def ndim(self) -> int:
        """Number of axes of the parameter it replaces."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """dtype of the dequantized parameter."""
        return self.scale.dtype

    @property
    def T(self) -> Self:  # noqa: N802
        """The transposed matrix, sharing its integers."""
        if self.scale.ndim != 1:
            raise ValueError(f"a packed parameter of shape {self.shape} is transposed one matrix at a time")
        return dataclasses.replace(self, transposed=not self.transposed)

    def __getitem__(self, index: Any) -> Self:
        """Indexes the leading axes; `...` returns the matrix itself."""
        if index is ...:
            return self
        if self.scale.ndim == 1:
            raise IndexError("a packed matrix has no rows of its own; `rows` looks some up")
        return jax.tree.map(lambda x: x[index], self)

    def __iter__(self) -> Iterator[Self]:
        """The matrices along the first leading axis."""
        return (self[i] for i in range(self.shape[0]))

    def rows(self, index: Array) -> Array:
        """Looks up rows of a matrix [out, in]: integers of any shape -> float32 [..., in]."""
        if self.transposed or self.scale.ndim != 1:
            raise ValueError(f"rows are looked up in one matrix [out, in], not in {self.shape} (transposed)")
        chosen = jax.tree.map(lambda x: x[index], self)
        return chosen.integers().astype(self.dtype) * chosen.scale[..., None]

    def dequantized(self) -> Array:
        """The parameter in float32: a copy four to eight times as large."""
        whole = self.integers().astype(self.dtype) * self.scale[..., None]
        return jnp.swapaxes(whole, -1, -2) if self.transposed else whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix(PackedMatrix):
    """weight[o, i] = scale[o] codes[o, i], with codes int8 [..., out, in]."""

    @property
    @override
    def num_inputs(self) -> int:
        return self.codes.shape[-1]

    @override
    def integers(self) -> Array:
        return self.codes

    @override
    def times(self, x: Array) -> Array:
        on_cpu = _times_converted_on_cpu if self.is_converted_for(x) else _times_by_digits
        return self.scale * lax.platform_dependent(x, self.codes, cpu=on_cpu, default=_times_converted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Matrix(PackedMatrix):
    """weight[o, i] = scale[o] (multiplier[o, g] code[o, i] + offset[o, g]) with 4-bit codes and g = i // GROUP_SIZE.

    The value in parentheses is within [-128, 127], so unpacking to int8 is exact. codes are uint8
    [..., out, in / 32, 16]; byte j of a group has code j in its low half and code j + 16 in its high half.
    """

    multiplier: Array
    """int8 [..., out, in / 32], from 1 to 17."""
    offset: Array
    """int8 [..., out, in / 32]."""

    @property
    @override
    def num_inputs(self) -> int:
        return self.codes.shape[-2] * GROUP_SIZE

    @override
    def integers(self) -> Array:
        return _unpacked(self.codes, self.multiplier, self.offset)

    @override
    def times(self, x: Array) -> Array:
        parts = (self.codes, self.multiplier, self.offset)
        on_cpu = _times_int4_converted_on_cpu if self.is_converted_for(x) else _times_int4_by_digits
        return self.scale * lax.platform_dependent(x, *parts, cpu=on_cpu, default=_times_int4_converted)


def product(x: Array, weight: PackedMatrix) -> Array:
    """x [rows, in] @ weight^T, for weight [out, in]: float32 [rows, out].

    Differentiable with respect to x; the backward pass materializes the matrix.
    """
    if weight.transposed or weight.scale.ndim != 1:
        raise ValueError(f"a product takes one matrix [out, in], not {weight.shape} (transposed: {weight.transposed})")
    return _product(x, weight)


@jax.custom_jvp
def _product(x: Array, weight: PackedMatrix) -> Array:
    return weight.times(x)


@_product.defjvp
def _product_jvp(primals: tuple[Array, PackedMatrix], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # Rounding to integers has no derivative, so differentiate the exact product.
    x, weight = primals
    y = _product(x, weight)
    return y, _contract(tangents[0].astype(y.dtype), weight.dequantized(), y.dtype)


def product_with_bfloat16(x: Array, weight: Array, *, in_axis: Literal[0, 1] = 1) -> Array:
    """x [rows, in] float32 @ weight^T, for weight bfloat16 [out, in], or [in, out] with in_axis 0: float32 [rows, out].

    Three bfloat16 numbers represent a float32 exactly, so x is split instead of converting the matrix to float32. On a
    CPU many rows are multiplied by the converted matrix: writing it takes little of their time, and three times the
    rows in bfloat16 take longer than as many in float32, with bfloat16 instructions and without.
    """
    split = functools.partial(_times_bfloat16_by_parts, in_axis=in_axis)
    if x.shape[0] <= _FEW_ROWS:
        return split(x, weight)
    converted = functools.partial(_times_bfloat16_converted, in_axis=in_axis)
    return lax.platform_dependent(x, weight, cpu=converted, default=split)


def _times_bfloat16_converted(x: Array, weight: Array, *, in_axis: Literal[0, 1]) -> Array:
    return lax.dot_general(x, weight.astype(x.dtype), (((1,), (in_axis,)), ((), ())))


def _times_bfloat16_by_parts(x: Array, weight: Array, *, in_axis: Literal[0, 1]) -> Array:
    parts: list[Array] = []
    for _ in range(3):
        # (XLA may remove a cast to bfloat16 and back.)
        parts.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    rows = jnp.concatenate(parts).astype(weight.dtype)
    y = lax.dot_general(rows, weight, (((1,), (in_axis,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.sum(rearrange(y, "(part rows) out -> part rows out", part=3), axis=0)


def split_rows(x: Array) -> tuple[Array, Array]:
    """Splits rows into sums of int8 rows: x = unit (d_1 + d_2 / 254 + d_3 / 254^2), to 6e-8 of a row's maximum.

    Args:
      x: [rows, in].

    Returns:
      The digits, int8 [3 rows, in], d_1 of all rows first; and the unit, float32 [rows, 1].
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.where(largest == 0, 1, largest / 127)
    rest = x / unit
    digits = []
    for _ in range(NUM_DIGITS):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * _DIGIT_BASE
    return jnp.concatenate(digits), unit


def _contract(x: Array, weight: Array, dtype: Any) -> Array:
    """x [rows, in] @ weight^T for weight [out, in]."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _times_converted(x: Array, integers: Array) -> Array:
    return _contract(x, integers.astype(x.dtype), jnp.float32)


def _times_converted_on_cpu(x: Array, integers: Array) -> Array:
    return _times_converted(x.astype(jnp.float32), integers)


def _times_int4_converted_on_cpu(x: Array, *parts: Array) -> Array:
    return _times_converted_on_cpu(x, _unpacked(*parts))


def _times_by_digits(x: Array, integers: Array) -> Array:
    digits, unit = split_rows(x)
    if x.shape[0] > _FEW_ROWS:
        return unit * _times_many(digits, integers)
    return _combine_digits(_contract_digits(digits, integers), unit)


def _times_many(digits: Array, integers: Array) -> Array:
    """The product, in units of `unit`, for many rows, where arithmetic dominates: float32 [rows, out].

    (With operands swapped as in `_contract_digits`, transposing the large result takes longer than the product.)
    """
    sums = _contract(digits, integers, jnp.int32).astype(jnp.float32)
    return _sum_digits(*rearrange(sums, "(digit rows) out -> digit rows out", digit=NUM_DIGITS))


def _contract_digits(digits: Array, integers: Array) -> Array:
    """integers [out, in] @ digits^T [in, rows] in int8: int32 [out, rows].

    The matrix is the left operand: XLA's CPU backend reorders the right operand at every call, which for a matrix takes
    up to three times as long as the product itself. (Transposing the result here makes XLA swap the operands back.)
    """
    return lax.dot_general(integers, digits, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _times_int4_converted(x: Array, codes: Array, multiplier: Array, offset: Array) -> Array:
    return _times_tiles(lambda x, tile: _times_converted(x, tile).T, x, codes, multiplier, offset).T


def _times_int4_by_digits(x: Array, codes: Array, multiplier: Array, offset: Array) -> Array:
    if x.shape[0] > _FEW_ROWS:  # unpacked as a whole: XLA would keep tiles of far more than one matrix at a time
        return _times_by_digits(x, _unpacked(codes, multiplier, offset))
    digits, unit = split_rows(x)
    sums = _times_tiles(_contract_digits, digits, codes, multiplier, offset)
    return _combine_digits(sums, unit)


def _combine_digits(sums: Array, unit: Array) -> Array:
    """Combines the digits' products, int32 [out, 3 rows], into the product of x: [rows, out]."""
    parts = rearrange(sums.astype(jnp.float32), "out (digit rows) -> digit out rows", digit=NUM_DIGITS)
    return (unit[:, 0] * _sum_digits(*parts)).T


def _sum_digits(first: Array, second: Array, third: Array) -> Array:
    return first + (second + third / _DIGIT_BASE) / _DIGIT_BASE


def _times_tiles(
    times: Callable[[Array, Array], Array], x: Array, codes: Array, multiplier: Array, offset: Array
) -> Array:
    """An unscaled 4-bit matrix, unpacked in tiles of rows, times x [rows, in]: [out, rows].

    Args:
      times: x and an int8 matrix [out, in] -> [out, rows].
    """
    out, num_groups, half = codes.shape
    # The two halves of the bytes are multiplied one after the other, so that they need not be interleaved.
    x_halves = rearrange(x, "rows (group two half) -> two rows (group half)", two=2, half=half)

    def tile(*parts: Array) -> Array:
        low, high = (rearrange(part, "out group half -> out (group half)") for part in _unpacked_halves(*parts))
        return times(x_halves[0], low) + times(x_halves[1], high)

    size = min(out, max(1, _TILE_ELEMENTS // (num_groups * GROUP_SIZE)))
    num_tiles = math.ceil(out / size)
    if num_tiles == 1:
        return tile(codes, multiplier, offset)
    # The last tile has the same size and overlaps the one before; the overlap is dropped.
    starts = jnp.minimum(jnp.arange(num_tiles) * size, out - size)
    y = lax.map(lambda start: tile(*(_from(start, size, part) for part in (codes, multiplier, offset))), starts)
    return jnp.concatenate([rearrange(y[:-1], "tile out rows -> (tile out) rows"), y[-1][num_tiles * size - out :]])


def _from(start: Array, size: int, x: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _unpacked(codes: Array, multiplier: Array, offset: Array) -> Array:
    """Unpacks bytes [..., in / 32, 16] to int8 [..., in], in units of the row's scale."""
    halves = jnp.concatenate(_unpacked_halves(codes, multiplier, offset), axis=-1)
    return rearrange(halves, "... group code -> ... (group code)")


def _unpacked_halves(codes: Array, multiplier: Array, offset: Array) -> tuple[Array, Array]:
    """Low and high halves of bytes [..., in / 32, 16], as int8 of the same shape in units of the row's scale."""
    low, high = (half.astype(jnp.int8) * multiplier[..., None] + offset[..., None] for half in (codes & 15, codes >> 4))
    return low, high
