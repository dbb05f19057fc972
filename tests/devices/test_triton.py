"""Every kernel for NVIDIA compiles for an H100, on its tensor cores, and spills no more than docs/kernels.md says."""

from __future__ import annotations

import pytest

from deviceless import TILES, TRITON, Direction, TritonResources, compile_output, compile_step, compile_triton
from kernel_resources import DOCUMENT, LARGE_HEADS, combinations, has_products, key, read_spills
from rwkv_kernels.precision import Precision
from rwkv_kernels.split_parts import BLOCK
from rwkv_kernels.testing.cases import Shape

pytestmark = pytest.mark.devices

KERNELS: dict[str, list[str]] = {"forward": ["forward"], "gradient": ["forward, storing", "backward"]}
SPLIT_KERNELS: dict[str, list[str]] = {
    "forward": ["factors", "states", "outputs"],
    "gradient": ["factors", "states", "outputs, storing", "cotangents", "gradients"],
}
WKV7_SPLIT_KERNELS = SPLIT_KERNELS | {"gradient": ["factors, storing", "states", "outputs", "cotangents", "gradients"]}
ELEMENT_WISE = {("wkv5_split", "states"), ("wkv6_split", "states")}
"""Kernels without matrix products."""
SMALL = Shape(2, 256, 2, 64, 64)

ALL = (*TRITON, TILES)
SPLIT = [operator for operator in TRITON if "split" in operator]
OF_TILES = pytest.param(TILES, marks=pytest.mark.long)

each_operator = pytest.mark.parametrize("operator", [*TRITON, OF_TILES])
# The kernels of a call without gradients are those of one with gradients, less what is kept for the backward pass.
each_direction = pytest.mark.parametrize("direction", [pytest.param("forward", marks=pytest.mark.long), "gradient"])


def _names(operator: str, direction: Direction, head_dim: int) -> list[str]:
    is_split = operator == TILES or "split" in operator
    if not is_split:
        return KERNELS[direction]
    names = (WKV7_SPLIT_KERNELS if operator.startswith("wkv7") else SPLIT_KERNELS)[direction]
    return names if head_dim <= BLOCK else [*names[:-1], "gradients of values", "gradients of keys"]


def _check(operator: str, direction: Direction, found: list[TritonResources], head_dim: int = 64) -> None:
    assert [x.kernel for x in found] == _names(operator, direction, head_dim)
    if operator == TILES:
        assert all(x.wgmma > 0 == x.mma_sync for x in found)
        assert all(x.shared_memory <= 232448 - 2048 - 512 for x in found)  # of which Mosaic takes some, and barriers
    for kernel in found:
        is_element_wise = not has_products(operator) or (operator, kernel.kernel) in ELEMENT_WISE
        assert (kernel.wgmma + kernel.mma_sync == 0) == is_element_wise


def _check_spills(operator: str, direction: Direction, dtype: str, precision: Precision) -> None:
    found = compile_triton(operator, direction, dtype, precision)
    _check(operator, direction, found)
    committed = read_spills(DOCUMENT.read_text(encoding="utf-8"))
    for kernel in found:
        assert kernel.spill_stores <= committed[key(operator, kernel, dtype, precision)]


@each_direction
@each_operator
def test_what_is_shipped_spills_no_more_than_the_table_says(operator: str, direction: Direction) -> None:
    _check_spills(operator, direction, "bfloat16", "full")


OTHERS = [(operator, *pair) for operator in ALL for pair in combinations(operator) if pair != ("bfloat16", "full")]


@pytest.mark.long
@pytest.mark.parametrize(("operator", "dtype", "precision"), OTHERS)
@each_direction
def test_other_precisions_spill_no_more_than_the_table_says(
    operator: str, direction: Direction, dtype: str, precision: Precision
) -> None:
    _check_spills(operator, direction, dtype, precision)


@each_operator
def test_packed_rows_compile(operator: str) -> None:
    _check(operator, "gradient", compile_triton(operator, "gradient", shape=SMALL, segments=True))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [(16, 16), (24, 40), (64, 32), (128, 128)])
@each_operator
def test_other_head_sizes_compile(operator: str, sizes: tuple[int, int], dtype: str) -> None:
    if operator == TILES and max(sizes) > 64:
        pytest.skip("its heads have at most 64 keys and values")
    shape = SMALL._replace(time=100, key_dim=sizes[0], value_dim=sizes[1])
    _check(operator, "gradient", compile_triton(operator, "gradient", dtype, shape=shape), max(sizes))


@pytest.mark.long
@pytest.mark.parametrize("operator", SPLIT)
def test_heads_of_128_spill_little_where_chunks_are_apart(operator: str) -> None:
    found = compile_triton(operator, "gradient", shape=LARGE_HEADS)
    _check(operator, "gradient", found, LARGE_HEADS.key_dim)
    committed = read_spills(DOCUMENT.read_text(encoding="utf-8"), LARGE_HEADS)
    for kernel in found:
        assert kernel.spill_stores <= min(512, committed[key(operator, kernel, "bfloat16", "full")]), kernel


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
@pytest.mark.parametrize("head_dim", [pytest.param(16, marks=pytest.mark.long), 32, 64, 128])
def test_a_token_of_rwkv_7_spills_nothing_and_moves_the_state_twice(head_dim: int, dtype: str) -> None:
    found = compile_step(dtype, head_dim)
    assert found.spill_stores == found.spill_loads == 0
    vectors = 9 * head_dim * (2 if dtype == "bfloat16" else 4)
    assert 0 <= found.bytes - (2 * 4 * head_dim**2 + vectors) < 1 + 32 * head_dim / 64  # parameters serve 64 rows


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
@pytest.mark.parametrize("head_dim", [pytest.param(16, marks=pytest.mark.long), 32, 64, 128])
def test_the_output_of_rwkv_7_spills_nothing_and_moves_each_array_once(head_dim: int, dtype: str) -> None:
    forward, backward = compile_output(dtype, head_dim, batch=2, time=1000)
    assert (forward.kernel, backward.kernel) == ("forward", "backward")
    for found, arrays in ((forward, 6), (backward, 11)):
        assert found.spill_stores == found.spill_loads == 0
        moved = arrays * head_dim * (2 if dtype == "bfloat16" else 4)
        assert moved <= found.bytes < 1.4 * moved, found  # padding, and a sum a parameter for each program
