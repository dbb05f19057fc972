"""Values and every gradient of each implementation against the definition, `scan`, in float64."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from rwkv_kernels.testing.cases import SHAPES, Shape
from tests.golden import assert_close, relative_error
from tests.kernels.operators import (
    WAYS,
    Way,
    as_jax,
    definition,
    each_way_but_briefly,
    exactly,
    problem,
    reference,
    with_gradients,
)

KERNEL_SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (2, 1, 1, 5, 12),
        (1, 15, 2, 8, 8),
        (2, 16, 1, 8, 8),
        (2, 17, 2, 24, 8),
        (3, 70, 2, 8, 6),
        (2, 257, 1, 8, 6),
    )
)
"""For interpreted kernels, which run slowly: what SHAPES goes through, smaller."""


def marks(way: Way, case: str, shape: Shape, dtype: str) -> tuple[pytest.MarkDecorator, ...]:
    """`long`, or nothing: compiling for all shapes takes minutes.

    In float32, where compiling takes three times as long, neither the form that nothing takes by default nor RWKV-5's
    shape of one decay a head; float64 has both.
    """
    sizes, is_usual = (shape.batch, shape.time), case == "realistic"
    if way.is_pallas:
        always = sizes == (3, 70) and is_usual
    elif way.name == "associative_scan":
        always = sizes == (3, 257) and is_usual and dtype == "float64"
    else:
        always = sizes == (3, 257) and (case != "one_decay_per_head" or dtype == "float64")
    return () if always else (pytest.mark.long,)


HALF_SHAPE = Shape(2, 17, 2, 24, 8)


def rows(dtype: str, *, definition: bool) -> list:
    """Every way with its shapes and cases."""
    return [
        pytest.param(
            way,
            case,
            shape,
            id=f"{way}-{case}-{shape}",
            marks=marks(way, case, shape, dtype),
        )
        for way in WAYS
        if definition or not way.is_definition
        for shape in (KERNEL_SHAPES if way.is_pallas else SHAPES)
        for case in way.operator.cases
    ]


@functools.cache
def errors_in_float32(way: Way, case: str, shape: Shape) -> dict[str, float]:
    """Relative error of each result and gradient, compiled as users compile, if they do."""
    results = with_gradients(way, quick=way.is_pallas)(*as_jax(problem(way.operator, case, shape), jnp.float32), {})
    assert {x.dtype for x in results.values()} == {jnp.dtype(jnp.float32)}
    exact = reference(way.operator, case, shape)
    return {name: relative_error(results[name], exact[name]) for name in exact}


@pytest.mark.parametrize(("way", "case", "shape"), rows("float32", definition=True))
def test_float32_is_as_close_as_float32_can_be(way: Way, case: str, shape: Shape) -> None:
    errors = errors_in_float32(way, case, shape)
    assert max(errors.values()) <= float32_bound(way, case, shape), errors


def float32_bound(way: Way, case: str, shape: Shape) -> float:
    """Largest relative error that any result or gradient may have."""
    # e^{log w} is rounded before the recurrence multiplies by it, the same way at every step. Where states live long
    # that adds up, and the definition is the worst of all: the chunked form adds logarithms and rounds once a chunk.
    if way.is_definition:
        return max(way.operator.rounding, shape.time * way.operator.drift)
    definition_has = max(errors_in_float32(definition(way.operator), case, shape).values())
    return max(4e-6, definition_has) if case == "realistic" else max(1e-5, 2 * definition_has)


@pytest.mark.parametrize(
    ("way", "case", "shape"),
    [row for row in rows("float64", definition=False) if not row.values[0].is_pallas],  # pyright: ignore
)
def test_float64_equals_the_definition(float64: None, way: Way, case: str, shape: Shape) -> None:
    results = with_gradients(way)(*problem(way.operator, case, shape), {})
    assert {x.dtype for x in results.values()} == {jnp.dtype(jnp.float64)}
    assert_close(results, reference(way.operator, case, shape), 1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
@each_way_but_briefly("chunked", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_half_precision_inputs_cost_one_rounding_of_each_result(way: Way, dtype: jnp.dtype) -> None:
    inputs, (dy, dstate) = problem(way.operator, "realistic", HALF_SHAPE)
    rounded = as_jax(inputs | {"state": None}, dtype) | {"state": as_jax(inputs["state"], jnp.float32)}
    cotangents = jnp.asarray(dy, dtype), as_jax(dstate, jnp.float32)
    results = with_gradients(way)(rounded, cotangents, {})
    exact = exactly(way.operator, rounded, cotangents)

    in_state_dtype = {name for name in results if name.startswith(("state", "dstate"))}
    assert {results[name].dtype for name in in_state_dtype} == {jnp.dtype(jnp.float32)}
    assert {results[name].dtype for name in results.keys() - in_state_dtype} == {jnp.dtype(dtype)}
    assert_close({n: results[n] for n in in_state_dtype}, {n: exact[n] for n in in_state_dtype}, 5e-6)
    assert_close(results, exact, float(jnp.finfo(dtype).eps) / 2)


@each_way_but_briefly("wkv6-chunked", "wkv7-chunked", "wkv7-pallas_triton_split")
def test_decay_in_float32_beside_half_precision_inputs(way: Way) -> None:
    # What a model in bfloat16 passes.
    inputs, (dy, dstate) = problem(way.operator, "slow_decay", HALF_SHAPE)
    in_float32 = as_jax({name: inputs[name] for name in ("log_w", "state")}, jnp.float32)
    mixed = as_jax(inputs, jnp.bfloat16) | in_float32
    cotangents = jnp.asarray(dy, jnp.bfloat16), as_jax(dstate, jnp.float32)
    results, exact = with_gradients(way)(mixed, cotangents, {}), exactly(way.operator, mixed, cotangents)
    assert results["dlog_w"].dtype == jnp.float32
    assert relative_error(results["dlog_w"], exact["dlog_w"]) < 5e-6
    assert_close(results, exact, float(jnp.finfo(jnp.bfloat16).eps) / 2)
