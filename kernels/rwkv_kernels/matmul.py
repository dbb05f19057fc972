"""Matmuls (NN, NT, TN) used inside a chunk, at a precision chosen by the caller.

Each one's derivative is written with the other two at the same precision: JAX would differentiate a product of bfloat16
operands by products of mixed dtypes, which the kernel backends do not have.
"""

from __future__ import annotations

import functools
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

    def nn(self, x: Array, y: Array) -> Array:
        """x y."""
        return self.multiply(x, y, "nn")

    def nt(self, x: Array, y: Array) -> Array:
        """x y^T."""
        return self.multiply(x, y, "nt")

    def tn(self, x: Array, y: Array) -> Array:
        """x^T y."""
        return self.multiply(x, y, "tn")

    def masked_sum(self, mask: Array, x: Array) -> Array:
        """mask x: sums of rows of x [..., C, N], which a mask [..., I, C] of 0, 1 and -1 selects and signs."""
        leading = jnp.broadcast_shapes(mask.shape[:-2], x.shape[:-2])
        mask = jnp.broadcast_to(mask.astype(x.dtype), (*leading, *mask.shape[-2:]))
        return self.exact(mask, jnp.broadcast_to(x, (*leading, *x.shape[-2:])), "nn")


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


def _kernel_multiply(precision: lax.PrecisionLike, half: bool) -> Multiply:
    def multiply(x: Array, y: Array, form: Form) -> Array:
        if half:
            x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return _dot(x, y, form, None if half else precision)

    return _with_own_derivative(multiply)


def triton_matmul(precision: Precision) -> Matmul:
    """Matmuls of 2-D float32 tiles on NVIDIA tensor cores: six passes of bfloat16, TF32, or bfloat16.

    Three passes of TF32 take as many tensor-core operations as six of bfloat16, and a third more registers, which are
    what the kernels run out of.
    """
    preset = lax.DotAlgorithmPreset
    chosen = preset.BF16_BF16_F32_X6 if precision == "full" else preset.TF32_TF32_F32
    return Matmul(_kernel_multiply(chosen, precision == "fast"), _kernel_masked_sum)


def _three_bfloat16(x: Array, y: Array, form: Form) -> Array:
    """Three-pass bfloat16 product of float32 matrices, which Mosaic does not have as a precision."""

    def split(x: Array) -> tuple[Array, Array]:
        leading = x.astype(jnp.bfloat16)
        return leading, (x - leading.astype(jnp.float32)).astype(jnp.bfloat16)

    (x, x_rest), (y, y_rest) = split(x), split(y)
    return _dot(x_rest, y, form, None) + _dot(x, y_rest, form, None) + _dot(x, y, form, None)


def mosaic_tpu_matmul(precision: Precision) -> Matmul:
    """Matmuls of 2-D float32 tiles on a TPU's matrix unit: six, three or one pass of bfloat16."""
    exact = _kernel_multiply(lax.Precision.HIGHEST, False)
    lesser = {"default": _with_own_derivative(_three_bfloat16), "fast": _kernel_multiply(None, True)}
    return Matmul(lesser.get(precision, exact), _kernel_masked_sum)


def _masked_sum_in_parts(mask: Array, x: Array, form: Form) -> Array:
    """mask x or mask^T x as exact as float32, for a mask that bfloat16 holds exactly; x is split in three such parts.

    Takes half the passes of a general float32 product, and masks take a quarter of the registers in which kernels keep
    them through all chunks.
    """
    parts: list[Array] = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    leading, following, last = (_dot(mask.astype(jnp.bfloat16), part, form, None) for part in parts)
    return last + following + leading


def _masked_sum_forward(mask: Array, x: Array, form: Form) -> tuple[Array, Array]:
    return _masked_sum_in_parts(mask, x, form), mask


def _masked_sum_backward(form: Form, mask: Array, dsums: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(mask), _masked_sum_in_parts(mask, dsums, "tn" if form == "nn" else "nn")  # a constant


_kernel_masked_sum = jax.custom_vjp(_masked_sum_in_parts, nondiff_argnums=(2,))
_kernel_masked_sum.defvjp(_masked_sum_forward, _masked_sum_backward)


Rounding = Literal["tf32", "bfloat16"]


def _round(x: Array, rounding: Rounding) -> Array:
    """Rounds to the precision of a tensor core's operands."""
    mantissa_bits = {"tf32": 10, "bfloat16": 7}[rounding]
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits)


def emulated(rounding: Rounding, terms: int) -> Multiply:
    """Emulates tensor-core matmuls of operands split into rounded parts.

    Args:
      rounding: of each part.
      terms: number of products of parts: 1 (one part), 3 (two parts) or 6 (three parts).
    """
    parts = {1: 1, 3: 2, 6: 3}[terms]

    def split(x: Array) -> list[Array]:
        rounded = []
        for _ in range(parts):
            rounded.append(_round(x, rounding))
            x = x - rounded[-1]
        return rounded

    def multiply(x: Array, y: Array, form: Form) -> Array:
        left, right = split(x), split(y)
        pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
        return sum(_dot(left[i], right[j], form, lax.Precision.HIGHEST) for i, j in reversed(pairs))  # type: ignore

    return _with_own_derivative(multiply)


def interpreted_matmul(precision: Precision) -> Matmul:
    """Matmuls of a kernel in interpret mode: float32, or emulated tensor cores for `default` and `fast`."""
    exact = _kernel_multiply(lax.Precision.HIGHEST, False)
    lesser = {"default": emulated("tf32", 1), "fast": emulated("bfloat16", 1)}
    return Matmul(lesser.get(precision, exact), exact)


def inline_custom_rules(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without `custom_vjp` calls, which Triton's lowering does not support.

    Taking the vjp inlines them; compilers drop the unused residuals.
    """
    return lambda *arguments: jax.vjp(function, *arguments)[0]


def _with_own_derivative(multiply: Multiply) -> Multiply:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x: Array, y: Array, form: Form) -> Array:
        return multiply(x, y, form)

    def forward(x: Array, y: Array, form: Form) -> tuple[Array, tuple[Array, Array]]:
        return multiply(x, y, form), (x, y)

    def backward(form: Form, saved: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
        x, y = saved
        if form == "nn":
            return multiply(dz, y, "nt"), multiply(x, dz, "tn")
        if form == "nt":
            return multiply(dz, y, "nn"), multiply(dz, x, "tn")
        return multiply(y, dz, "nt"), multiply(x, dz, "nn")

    product.defvjp(forward, backward)
    return cast(Multiply, product)
