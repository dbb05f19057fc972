"""What is special to operators whose chunks are apart: blocks of the state's rows, and of large heads' columns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.pallas import triton_split
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, assert_close
from tests.kernels.operators import WAYS, Way, as_jax, differentiate, exactly, problem, reference

SPLIT = [way for way in WAYS if way.name == "pallas_triton_split"]
each_way = pytest.mark.parametrize("way", SPLIT, ids=str)


BLOCKS = ((1, 40), (128, 40), (1, 100))


@pytest.mark.parametrize(
    ("way", "programs", "rows"),
    [
        pytest.param(
            way,
            *blocks,
            # One for each operator, and all where the states pass through a matrix.
            marks=() if way.operator.name == "wkv7" or blocks == BLOCKS[number] else pytest.mark.long,
            id=f"{way}-{blocks[0]}-{blocks[1]}",
        )
        for number, way in enumerate(SPLIT)
        for blocks in BLOCKS
    ],
)
def test_programs_may_share_the_rows_of_a_state(
    monkeypatch: pytest.MonkeyPatch, way: Way, programs: int, rows: int
) -> None:
    # 40 rows, padded to 64: one program for all of them, or four. 100 rows, padded to 128: two of 64.
    monkeypatch.setattr(triton_split, "PROGRAMS", programs)
    shape = Shape(1, 33, 1, 8, rows)
    results = jax.jit(functools.partial(differentiate, way.run), compiler_options=QUICK)
    exact = reference(way.operator, "realistic", shape)
    assert_close(results(*as_jax(problem(way.operator, "realistic", shape), jnp.float32), {}), exact, way.bound)


@each_way
def test_large_heads_have_gradients_by_blocks_of_columns(way: Way) -> None:
    # 100 keys and 70 values, both padded to 128: two programs a chunk in each of two kernels.
    given = problem(way.operator, "realistic", Shape(1, 40, 1, 100, 70))
    options = {"segment_ids": (np.arange(40) // 17)[None].astype(np.int32)}
    results = jax.jit(functools.partial(differentiate, way.run), compiler_options=QUICK)
    traced = results.trace(*as_jax(given, jnp.float32), options)
    names = (f"{way.operator}_split_gradients_of_{part}" for part in ("values", "keys"))
    assert all(name in str(traced.jaxpr) for name in names)
    found = traced.lower().compile()(*as_jax(given, jnp.float32), options)
    assert_close(found, exactly(way.operator, *given, options), way.bound)
