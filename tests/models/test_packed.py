"""Products from packed matrices: those of the numbers they stand for, from memory as they lie there."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.models.layers import Embedding, linear, low_rank
from rwkv_jax.models.packed import GROUP_SIZE, PackedMatrix, product, product_with_bfloat16, split_rows
from rwkv_jax.weights.quantized import Quantization, pack, packed_matrix
from tests.golden import relative_error

both = pytest.mark.parametrize("quantization", ["int8", "int4"])


def normal(*shape: int, seed: int = 0) -> NDArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(matrix: NDArray, quantization: Quantization, *, transposed: bool = False) -> PackedMatrix:
    """A matrix [..., out, in] packed."""
    return packed_matrix(jax.tree.map(jnp.asarray, pack(matrix, quantization)), transposed=transposed)


def in_float64(x: Array, weight: PackedMatrix) -> NDArray:
    return np.asarray(x, np.float64) @ np.asarray(weight.dequantized(), np.float64).T


@both
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [
        (1, 40, 96),
        (5, 40, 96),
        (1, 3072, 128),  # rows read as longer ones
        (2, 3072, 128),
        (1, 1031, 1024),  # unpacked in tiles, of which the last one overlaps
        (3, 1031, 1024),
    ],
)
def test_a_product_is_that_of_the_numbers_it_stands_for(
    quantization: Quantization, rows: int, out: int, width: int
) -> None:
    x, weight = jnp.asarray(normal(rows, width, seed=1)), packed(normal(out, width), quantization)
    assert relative_error(jax.jit(product)(x, weight), in_float64(x, weight)) < 1e-6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is a CPU's")
@both
@pytest.mark.parametrize(("rows", "is_converted"), [(16, False), (17, True)])
def test_on_a_cpu_many_rows_may_be_multiplied_by_the_converted_matrix(
    quantization: Quantization, rows: int, is_converted: bool
) -> None:
    x, weight = jnp.asarray(normal(rows, 96, seed=1)), packed(normal(40, 96), quantization)
    weight = dataclasses.replace(weight, many_rows="converted")
    for x_dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-6)):
        rounded = x.astype(x_dtype)
        assert relative_error(jax.jit(product)(rounded, weight), in_float64(rounded, weight)) < bound
    compiled = jax.jit(product).lower(x, weight).compile().as_text() or ""
    assert (f"s8[{3 * rows},96]" not in compiled) is is_converted


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("x_dtype", "held"),
    [("float32", "int8"), ("float32", "int4"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_a_product_does_not_write_the_matrix_out(x_dtype: str, held: Quantization, rows: int) -> None:
    out, width = 2048, 1024
    matrix = normal(out, width)
    weight = jnp.asarray(matrix, jnp.bfloat16) if held == "bfloat16" else packed(matrix, held)
    compiled = jax.jit(linear).lower(jnp.zeros((rows, width), x_dtype), weight).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < out * width / 2
    wider = "f32" if held == "bfloat16" else "f32|bf16|s32"
    assert not re.search(rf"({wider})\[{out},{width}\]", compiled.as_text() or "")


@pytest.mark.parametrize("in_axis", [0, 1])
@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (1, 3, 96), (80, 96)])
def test_few_rows_of_bfloat16_give_what_many_do(shape: tuple[int, ...], in_axis: Literal[0, 1]) -> None:
    x, weight = jnp.asarray(normal(*shape), jnp.bfloat16), jnp.asarray(normal(40, 96, seed=1), jnp.bfloat16)
    given = weight if in_axis == 1 else weight.T
    for out_dtype in (None, jnp.dtype("float32")):
        y = linear(x, given, in_axis=in_axis, out_dtype=out_dtype)
        assert (y.dtype, y.shape) == (out_dtype or jnp.bfloat16, (*shape[:-1], 40))
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        assert relative_error(y, exact) < (0.01 if out_dtype is None else 1e-6)
    gradient = jax.grad(lambda x, weight: jnp.sum(linear(x, weight, in_axis=in_axis)), argnums=(0, 1))(x, given)
    assert relative_error(gradient[0], np.broadcast_to(np.asarray(weight, np.float64).sum(0), shape)) < 0.01
    expected = np.broadcast_to(np.asarray(x, np.float64).reshape(-1, 96).sum(0), (40, 96))
    assert relative_error(gradient[1], expected if in_axis == 1 else expected.T) < 0.01


def test_rows_are_split_into_int8_without_loss() -> None:
    x = normal(4, 300) * np.array([[1e-30], [1.0], [1e20], [0.0]], np.float32)
    digits, unit = split_rows(jnp.asarray(x))
    assert (digits.dtype, digits.shape) == (jnp.int8, (12, 300))
    first, second, third = np.asarray(digits, np.float64).reshape(3, 4, 300)
    again = np.asarray(unit, np.float64) * (first + second / 254 + third / 254**2)
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(again - x) <= 2e-7 * largest).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_show_in_the_result(bad: float) -> None:
    x = normal(2, 64)
    x[1, 3] = bad
    y = np.asarray(product(jnp.asarray(x), packed(normal(8, 64), "int8")))
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


@both
def test_gradients_reach_the_input(quantization: Quantization) -> None:
    x, weight, cotangent = jnp.asarray(normal(2, 64)), packed(normal(24, 64), quantization), jnp.asarray(normal(2, 24))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(product(x, weight) * cotangent)))(x)
    assert relative_error(gradient, np.asarray(cotangent @ weight.dequantized())) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is a CPU's")
@pytest.mark.parametrize(("rows", "is_split"), [(16, True), (17, False)])
def test_on_a_cpu_only_few_rows_are_split_for_a_bfloat16_matrix(rows: int, is_split: bool) -> None:
    compiled = jax.jit(linear).lower(jnp.zeros((rows, 96)), jnp.zeros((40, 96), jnp.bfloat16)).compile()
    assert (f"bf16[{3 * rows},96]" in (compiled.as_text() or "")) is is_split


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("in_axis", [0, 1])
def test_bfloat16_matrices_are_multiplied_with_all_digits_of_float32(in_axis: int, rows: int) -> None:
    x, weight = normal(rows, 96), jnp.asarray(normal(40, 96), jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(weight, np.float64).T
    given = weight if in_axis == 1 else weight.T
    y = jax.jit(product_with_bfloat16, static_argnames="in_axis")(jnp.asarray(x), given, in_axis=in_axis)
    assert relative_error(y, exact) < 1e-6
    assert relative_error(linear(jnp.asarray(x), given, in_axis=in_axis), exact) < 1e-6  # pyright: ignore[reportArgumentType]


@both
def test_layers_take_packed_matrices_where_they_took_arrays(quantization: Quantization) -> None:
    x = jnp.asarray(normal(2, 3, 64))
    weight = packed(normal(32, 64), quantization)
    assert relative_error(linear(x, weight), x @ weight.dequantized().T) < 1e-5
    assert linear(x.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16
    down, up = (packed(normal(*shape), quantization, transposed=True) for shape in ((32, 64), (64, 32)))
    assert down.shape == (64, 32)
    expected = jnp.tanh(x @ down.dequantized()) @ up.dequantized()
    assert relative_error(low_rank(x, down, up, jnp.tanh), expected) < 1e-5
    embedding = Embedding(jnp.zeros((32, 64)))
    embedding.weight = nnx.Param(weight)  # pyright: ignore[reportAttributeAccessIssue]
    tokens = jnp.array([[3, 31], [0, 3]])
    assert relative_error(embedding(tokens), weight.dequantized()[tokens]) == 0


@both
def test_stacked_matrices_are_scanned_and_taken_apart(quantization: Quantization) -> None:
    stack, x = packed(normal(3, 16, 64), quantization), jnp.asarray(normal(1, 64))
    assert (stack.shape, stack.ndim, stack[...] is stack) == ((3, 16, 64), 3, True)
    _, scanned = jax.lax.scan(lambda _, weight: (None, product(x, weight)), None, stack)
    for y, weight in zip(scanned, stack, strict=True):
        assert relative_error(y, in_float64(x, weight)) < 1e-6
        assert (weight.T.shape, weight.T.T.shape) == ((64, 16), (16, 64))


def test_what_a_packed_matrix_cannot_do_is_said() -> None:
    stack = packed(normal(3, 16, 64), "int8")
    with pytest.raises(ValueError, match=r"a product takes one matrix \[out, in\], not \(64, 16\)"):
        product(jnp.zeros((1, 64)), stack[0].T)
    with pytest.raises(ValueError, match="one matrix at a time"):
        _ = stack.T
    with pytest.raises(ValueError, match="rows are looked up in one matrix"):
        stack.rows(jnp.array([0]))
    with pytest.raises(IndexError, match="no rows of its own"):
        _ = stack[0][0]


def test_unpacked_4_bit_numbers_fit_into_8() -> None:
    matrix = normal(50, 256) * np.exp(2 * normal(50, 256, seed=2))
    weight = packed(matrix, "int4")
    exact = (
        (np.asarray(weight.codes)[..., None] >> np.array([0, 4], np.uint8) & 15).swapaxes(-1, -2).astype(int)
        * np.asarray(weight.multiplier, int)[..., None, None]  # pyright: ignore[reportAttributeAccessIssue]
        + np.asarray(weight.offset, int)[..., None, None]  # pyright: ignore[reportAttributeAccessIssue]
    ).reshape(50, 256)
    assert exact.min() >= -128
    assert exact.max() <= 127
    np.testing.assert_array_equal(weight.integers(), exact)
    assert weight.codes.shape == (50, 256 // GROUP_SIZE, 16)
