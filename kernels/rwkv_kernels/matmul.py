"""Matmuls (NN, NT, TN) used inside a chunk, at a precision chosen by the caller.

In kernels each one's derivative is written with the other two at the same precision: JAX would differentiate a product
of bfloat16 operands by products of mixed dtypes, which the kernel backends do not have.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.precision import XLA, Precision

Form = Literal["nn", "nt", "tn"]
"""Which operand is transposed: none, the right one, the left one."""

Multiply = Callable[[Array, Array, Form], Array]
"""(x, y, form) -> their product over the last two axes, in float32 (float64 stays float64)."""


class Matmul(NamedTuple):
    """Matmuls inside a chunk."""

    multiply: Multiply
    """For vectors, scores and states, at the requested precision."""
    exact: Multiply
    """For sums of logarithms, written as matmuls with 0, 1 and -1: always as exact as float32."""
    own_derivatives: bool = False
    """Derivatives by the same matmuls, as kernels need them; else by JAX."""
    bfloat16_values: bool = False
    """v and dy are bfloat16, cast to float32: kernels multiply by them in fewer passes."""
    bfloat16_decays: bool = False
    """log w is."""

    def nn(self, x: Array, y: Array, values: str = "") -> Array:
        """x y. `values` names what is v or dy, and so may be bfloat16: "x", "y", and "z" for the result's cotangent."""
        return self._product(x, y, "nn", values)

    def nt(self, x: Array, y: Array, values: str = "") -> Array:
        """x y^T."""
        return self._product(x, y, "nt", values)

    def tn(self, x: Array, y: Array, values: str = "") -> Array:
        """x^T y."""
        return self._product(x, y, "tn", values)

    def _product(self, x: Array, y: Array, form: Form, values: str) -> Array:
        product = _with_own_derivative(self.multiply) if self.own_derivatives else _in_bfloat16(self.multiply)
        return product(x, y, form, values if self.bfloat16_values else "")

    def masked_sum(self, mask: Array, log_w: Array) -> Array:
        """mask log_w: sums of rows of log_w [..., C, N], which a mask [..., I, C] of 0, 1 and -1 selects and signs."""
        leading = jnp.broadcast_shapes(mask.shape[:-2], log_w.shape[:-2])
        mask = jnp.broadcast_to(mask.astype(log_w.dtype), (*leading, *mask.shape[-2:]))
        log_w = jnp.broadcast_to(log_w, (*leading, *log_w.shape[-2:]))
        masked_sum = _masked_sum_with_own_derivative(self.exact) if self.own_derivatives else _in_bfloat16(self.exact)
        return masked_sum(mask, log_w, "nn", "y" if self.bfloat16_decays else "")


def plain(precision: lax.PrecisionLike) -> Multiply:
    """Matmuls by XLA, differentiated by JAX."""

    def multiply(x: Array, y: Array, form: Form) -> Array:
        x = x.swapaxes(-1, -2) if form == "tn" else x
        y = y.swapaxes(-1, -2) if form == "nt" else y
        return jnp.matmul(x, y, precision=precision)

    return multiply


def xla_matmul(precision: Precision) -> Matmul:
    """Matmuls of the chunked forms."""
    return Matmul(plain(XLA[precision]), plain(lax.Precision.HIGHEST))


def _dot(x: Array, y: Array, form: Form, precision: lax.PrecisionLike) -> Array:
    """The product of two matrices as one `dot_general`, without explicit transposes."""
    contracted = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[form]
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _split(x: Array, parts: int) -> list[Array]:
    """bfloat16 parts of a float32 array, the largest first; three hold all its digits."""
    pieces: list[Array] = []
    for _ in range(parts):
        pieces.append(x.astype(jnp.bfloat16))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces


def _smallest_first(terms: list[Array]) -> Array:
    """The sum of terms that are listed from the largest down."""
    return functools.reduce(operator.add, reversed(terms))


def _float32(x: Array, y: Array, form: Form) -> Array:
    return _dot(x.astype(jnp.float32), y.astype(jnp.float32), form, lax.Precision.HIGHEST)


def _one_bfloat16(x: Array, y: Array, form: Form) -> Array:
    return _dot(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), form, None)


def _three_bfloat16(x: Array, y: Array, form: Form) -> Array:
    """Three-pass bfloat16 product of float32 matrices, which Mosaic does not have as a precision."""
    (x, x_rest), (y, y_rest) = _split(x, 2), _split(y, 2)
    return _dot(x_rest, y, form, None) + _dot(x, y_rest, form, None) + _dot(x, y, form, None)


def _several_bfloat16(preset: lax.DotAlgorithmPreset, parts: int) -> Multiply:
    """Matmul on NVIDIA tensor cores in several passes; an operand that is bfloat16 already is one part.

    Args:
      preset: for two float32 operands.
      parts: bfloat16 parts of a float32 operand.
    """

    def multiply(x: Array, y: Array, form: Form) -> Array:
        if x.dtype == y.dtype == jnp.float32:
            return _dot(x, y, form, preset)
        left, right = ([part] if part.dtype == jnp.bfloat16 else _split(part, parts) for part in (x, y))
        return _smallest_first([_dot(i, j, form, None) for i in left for j in right])

    return multiply


def operand(x: Array) -> Array:
    """What a kernel multiplies of what it has loaded: bfloat16 stays, for fewer passes; all else becomes float32."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def triton_matmul(precision: Precision) -> Matmul:
    """Matmuls of 2-D tiles on NVIDIA tensor cores: six, three or one pass of bfloat16.

    A tile that is bfloat16 already takes half of six passes and two of three, and two such tiles take one. Three passes
    of TF32 take as many tensor-core operations as six of bfloat16, and a third more registers, which are what the
    kernels run out of.
    """
    preset = lax.DotAlgorithmPreset
    chosen: dict[Precision, Multiply] = {
        "full": _several_bfloat16(preset.BF16_BF16_F32_X6, 3),
        "default": _several_bfloat16(preset.BF16_BF16_F32_X3, 2),
        "fast": _one_bfloat16,
    }
    return Matmul(chosen[precision], _masked_sum_in_parts, own_derivatives=True)


def mosaic_tpu_matmul(precision: Precision) -> Matmul:
    """Matmuls of 2-D float32 tiles on a TPU's matrix unit: six, three or one pass of bfloat16."""
    chosen: dict[Precision, Multiply] = {"full": _float32, "default": _three_bfloat16, "fast": _one_bfloat16}
    return Matmul(chosen[precision], _masked_sum_in_parts, own_derivatives=True)


def _masked_sum_in_parts(mask: Array, x: Array, form: Form) -> Array:
    """mask x or mask^T x as exact as float32, for a mask that bfloat16 holds exactly; x is split in three such parts.

    Takes half the passes of a general float32 product, and masks take a quarter of the registers in which kernels keep
    them through all chunks. An x that is bfloat16 already is one part.
    """
    parts = [x] if x.dtype == jnp.bfloat16 else _split(x, 3)
    return _smallest_first([_dot(mask.astype(jnp.bfloat16), part, form, None) for part in parts])


def emulated(passes: int) -> Multiply:
    """Emulates tensor-core matmuls of operands that are split into bfloat16 parts.

    Args:
      passes: number of products of parts: 1 (one part), 3 (two parts) or 6 (three parts). An operand that is bfloat16
        already has zeros for its further parts, which are as good as left out.
    """
    parts = {1: 1, 3: 2, 6: 3}[passes]

    def split(x: Array) -> list[Array]:
        x, rounded = x.astype(jnp.float32), []
        for _ in range(parts):
            rounded.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - rounded[-1]
        return rounded

    def multiply(x: Array, y: Array, form: Form) -> Array:
        left, right = split(x), split(y)
        pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
        return cast(Array, sum(_dot(left[i], right[j], form, lax.Precision.HIGHEST) for i, j in reversed(pairs)))

    return multiply


def emulated_matmul(precision: Precision) -> Matmul:
    """What the precision of a kernel computes on a device."""
    return Matmul(emulated({"full": 6, "default": 3, "fast": 1}[precision]), emulated(6), own_derivatives=True)


def interpreted_matmul(precision: Precision) -> Matmul:
    """Matmuls of a kernel in interpret mode: float32, or emulated tensor cores for `default` and `fast`."""
    multiply = _float32 if precision == "full" else emulated_matmul(precision).multiply
    return Matmul(multiply, _float32, own_derivatives=True)


def inline_custom_rules(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without `custom_vjp` calls, which Triton's lowering does not support.

    Taking the vjp inlines them; compilers drop the unused residuals.
    """
    return lambda *arguments: jax.vjp(function, *arguments)[0]


_Product = Callable[[Array, Array, Form, str], Array]
"""(x, y, form, names) -> their product; names of x, y and the result's cotangent z that matmuls get in bfloat16."""


def _named(names: str, **arrays: Array) -> tuple[Array, ...]:
    """The arrays, those that are named in bfloat16."""
    return tuple(x.astype(jnp.bfloat16) if name in names else x for name, x in arrays.items())


def _in_bfloat16(multiply: Multiply) -> _Product:
    def product(x: Array, y: Array, form: Form, names: str) -> Array:
        x, y = _named(names, x=x, y=y)
        return multiply(x, y, form)

    return product


@functools.cache
def _with_own_derivative(multiply: Multiply) -> _Product:
    def forward(x: Array, y: Array, form: Form, names: str) -> tuple[Array, tuple[Array, Array]]:
        return _in_bfloat16(multiply)(x, y, form, names), (x, y)

    def backward(form: Form, names: str, saved: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
        x, y, dz = _named(names, x=saved[0], y=saved[1], z=dz)
        if form == "nn":
            return multiply(dz, y, "nt"), multiply(x, dz, "tn")
        if form == "nt":
            return multiply(dz, y, "nn"), multiply(dz, x, "tn")
        return multiply(y, dz, "nt"), multiply(x, dz, "nn")

    product = jax.custom_vjp(_in_bfloat16(multiply), nondiff_argnums=(2, 3))
    product.defvjp(forward, backward)
    return cast(_Product, product)


@functools.cache
def _masked_sum_with_own_derivative(exact: Multiply) -> _Product:
    def forward(mask: Array, x: Array, form: Form, names: str) -> tuple[Array, Array]:
        return _in_bfloat16(exact)(mask, x, form, names), mask

    def backward(form: Form, names: str, mask: Array, dsums: Array) -> tuple[Array, Array]:
        del names
        return jnp.zeros_like(mask), exact(mask, dsums, "tn" if form == "nn" else "nn")  # the mask is a constant

    product = jax.custom_vjp(_in_bfloat16(exact), nondiff_argnums=(2, 3))
    product.defvjp(forward, backward)
    return cast(_Product, product)
