"""Every TPU kernel compiles for every generation that is named in docs/kernels.md."""

from __future__ import annotations

import pytest

from deviceless import GENERATIONS, TPU, TPU_SHAPE, Direction, compile_tpu
from kernel_resources import combinations
from rwkv_kernels.precision import Precision

pytestmark = pytest.mark.devices

KERNELS: dict[str, list[str]] = {"forward": ["forward"], "gradient": ["backward", "forward, storing"]}

each_generation = pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name == "v5p" else pytest.mark.long) for name in GENERATIONS]
)
each_operator = pytest.mark.parametrize("operator", TPU)


@pytest.mark.parametrize("segments", [False, True], ids=["one_segment", "packed"])
@pytest.mark.parametrize("direction", [pytest.param("forward", marks=pytest.mark.long), "gradient"])
@each_operator
@each_generation
def test_what_is_shipped_compiles(generation: str, operator: str, direction: Direction, segments: bool) -> None:
    found = compile_tpu(generation, operator, direction, segments=segments)
    assert [x.kernel for x in found] == KERNELS[direction]
    assert all(x.vmem < 16 << 20 for x in found)  # what a program may have by default, on any generation


OTHERS = [(operator, *pair) for operator in TPU for pair in (*combinations(operator), ("float16", "full"))]


@pytest.mark.long
@pytest.mark.parametrize(("operator", "dtype", "precision"), OTHERS)
@each_generation
def test_other_precisions_compile(generation: str, operator: str, dtype: str, precision: Precision) -> None:
    found = compile_tpu(generation, operator, "gradient", dtype, precision)
    assert [x.kernel for x in found] == KERNELS["gradient"]


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(16, 16), (24, 40), (128, 128)])
@each_operator
@each_generation
def test_other_head_sizes_compile(generation: str, operator: str, sizes: tuple[int, int]) -> None:
    shape = TPU_SHAPE._replace(time=100, key_dim=sizes[0], value_dim=sizes[1])
    found = compile_tpu(generation, operator, "gradient", shape=shape)
    assert [x.kernel for x in found] == KERNELS["gradient"]
