"""Chunks of another size than an implementation's own: the same results, and a refusal where there can be none."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels import dispatch
from rwkv_kernels.ops.wkv7.api import log_decay_floor
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, assert_close
from tests.kernels.operators import (
    OPERATORS,
    WAYS,
    Operator,
    Way,
    as_jax,
    each_operator,
    exactly,
    named,
    problem,
    reference,
)

SHAPE = Shape(2, 40, 2, 4, 3)
CHUNKED = [way for way in WAYS if way.operator.parts.implementations[way.name].min_chunk_size is not None]
each_chunked_way = pytest.mark.parametrize("way", CHUNKED, ids=str)


def in_chunks(way: Way, size: int) -> Any:
    """(inputs) -> y and the final state, with chunks of a size."""
    inner = way.operator.parts.implementations[way.name]
    interpreted = functools.partial(inner.run, interpret=True) if way.is_pallas else inner.run
    chosen = dispatch.Implementation(interpreted, dispatch.anything, inner.min_chunk_size)
    return lambda inputs: way.operator.run(**inputs, implementation=chosen, chunk_size=size)


@pytest.mark.usefixtures("arithmetic")
@each_chunked_way
def test_chunks_of_another_size_give_the_same(way: Way) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    expected = reference(way.operator, "realistic", SHAPE)
    size = 32 if way.is_pallas else 16  # others than their own
    results = named(*jax.jit(in_chunks(way, size), compiler_options=QUICK)(inputs))
    assert_close(results, {name: expected[name] for name in results}, way.bound)


@each_chunked_way
def test_a_size_changes_the_program(way: Way) -> None:
    inputs = as_jax(problem(way.operator, "realistic", SHAPE)[0], jnp.float32)
    programs = {str(jax.make_jaxpr(in_chunks(way, size))(inputs)) for size in (16, 32)}
    assert len(programs) == 2


@each_operator
def test_only_one_with_chunks_is_taken_by_default_where_a_size_is_given(operator: Operator) -> None:
    inputs = as_jax(problem(operator, "realistic", SHAPE._replace(time=1))[0], jnp.float32)
    assert_close(
        jax.tree.map(np.asarray, named(*operator.run(**inputs, chunk_size=8))),
        jax.tree.map(np.asarray, named(*operator.run(**inputs, implementation="chunked", chunk_size=8))),
        0,
    )


@each_operator
@pytest.mark.parametrize("size", [-4, 0, 3, 48, 16.0])
def test_sizes_that_are_no_power_of_two_are_refused(operator: Operator, size: Any) -> None:
    inputs = as_jax(problem(operator, "realistic", SHAPE)[0], jnp.float32)
    message = f"chunk_size = {size}: must be a power of two of at least 1 for 'chunked' of {operator}"
    for implementation in (None, "chunked"):
        with pytest.raises(ValueError, match=message):
            operator.run(**inputs, implementation=implementation, chunk_size=size)


@each_operator
def test_one_without_chunks_takes_no_size(operator: Operator) -> None:
    inputs = as_jax(problem(operator, "realistic", SHAPE)[0], jnp.float32)
    message = f"chunk_size = 16: 'scan' of {operator} has no chunks to choose; leave chunk_size out or name .*'chunked'"
    with pytest.raises(ValueError, match=message):
        operator.run(**inputs, implementation="scan", chunk_size=16)


@pytest.mark.parametrize("way", [way for way in CHUNKED if way.is_pallas], ids=str)
def test_kernels_refuse_chunks_smaller_than_their_tiles(way: Way) -> None:
    inputs = as_jax(problem(way.operator, "realistic", SHAPE)[0], jnp.float32)
    smallest = way.operator.parts.implementations[way.name].min_chunk_size
    message = f"chunk_size = 4: must be a power of two of at least {smallest} for the given one of {way.operator}"
    with pytest.raises(ValueError, match=message):
        in_chunks(way, 4)(inputs)


@pytest.mark.parametrize(
    "size", [8, pytest.param(16, marks=pytest.mark.long), pytest.param(64, marks=pytest.mark.long)]
)
def test_the_floor_of_wkv7_follows_from_the_size(size: int) -> None:
    operator = next(operator for operator in OPERATORS if operator.name == "wkv7")
    inputs, cotangents = problem(operator, "realistic", Shape(1, 70, 1, 4, 3))

    def y(log_w: float) -> tuple[Any, Any]:
        given = inputs | {"log_w": np.full_like(inputs["log_w"], log_w)}
        run = functools.partial(operator.run, implementation="chunked", chunk_size=size)
        return np.asarray(run(**as_jax(given, jnp.float32))[0]), exactly(operator, given, cotangents)["y"]

    found, exact = y(log_decay_floor(size))
    assert np.linalg.norm(found - exact) <= 5e-5 * np.linalg.norm(exact)
    assert np.any(np.isnan(y(2 * log_decay_floor(size))[0]))


def test_importing_the_operators_does_not_load_pallas() -> None:
    program = "import sys, rwkv_kernels; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
