"""Values and every gradient of each implementation against the definition, `scan`, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.wkv7.cases import Shape
from tests.golden import assert_close
from tests.kernels.operators import PAIRS, SHAPES, Operator, as_jax, each_pair, problem, reference, with_gradients

ROWS = [
    pytest.param(
        operator, implementation, case, shape, id=f"{operator}-{implementation}-{case}-{'x'.join(map(str, shape))}"
    )
    for shape in SHAPES
    for operator, implementation in PAIRS
    for case in operator.cases
]
HALF_SHAPE = Shape(1, 17, 2, 24, 8)
HALVES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(("operator", "implementation", "case", "shape"), ROWS)
def test_float32_is_as_close_as_float32_can_be(
    operator: Operator, implementation: str, case: str, shape: Shape
) -> None:
    results = with_gradients(operator, implementation, quick=False)(
        *as_jax(problem(operator, case, shape), jnp.float32)
    )
    assert {x.dtype for x in results.values()} == {jnp.dtype(jnp.float32)}
    assert_close(results, reference(operator, case, shape), operator.float32_bound(implementation, case, shape))


@pytest.mark.parametrize(
    ("operator", "implementation", "case", "shape"),
    [row for row in ROWS if row.values[1] != "scan" and row.values[3].batch == 3],  # pyright: ignore
)
def test_float64_equals_the_definition(
    float64: None, operator: Operator, implementation: str, case: str, shape: Shape
) -> None:
    results = with_gradients(operator, implementation)(*problem(operator, case, shape))
    assert {x.dtype for x in results.values()} == {jnp.dtype(jnp.float64)}
    assert_close(results, reference(operator, case, shape), 1e-12)


@pytest.mark.parametrize("dtype", HALVES)
@each_pair
def test_half_precision_inputs_cost_one_rounding_of_each_result(
    operator: Operator, implementation: str, dtype: jnp.dtype
) -> None:
    inputs, (dy, dstate) = problem(operator, "realistic", HALF_SHAPE)
    rounded = as_jax(inputs | {"state": None}, dtype) | {"state": as_jax(inputs["state"], jnp.float32)}
    cotangents = jnp.asarray(dy, dtype), as_jax(dstate, jnp.float32)
    results = with_gradients(operator, implementation, quick=False)(rounded, cotangents)

    with jax.enable_x64(True):
        exact = with_gradients(operator, "scan")(
            *jax.tree.map(lambda x: np.asarray(x, np.float64), (rounded, cotangents))
        )
        exact = {name: np.asarray(x) for name, x in exact.items()}

    in_state_dtype = {name for name in results if name.startswith(("state", "dstate"))}
    assert {results[name].dtype for name in in_state_dtype} == {jnp.dtype(jnp.float32)}
    assert {results[name].dtype for name in results.keys() - in_state_dtype} == {jnp.dtype(dtype)}
    assert_close({n: results[n] for n in in_state_dtype}, {n: exact[n] for n in in_state_dtype}, 5e-6)
    assert_close(results, exact, float(jnp.finfo(dtype).eps) / 2)


@each_pair
def test_decay_in_float32_beside_half_precision_inputs(operator: Operator, implementation: str) -> None:
    # What a model in bfloat16 passes.
    inputs, cotangents = problem(operator, "slow_decay", HALF_SHAPE)
    mixed = as_jax(inputs, jnp.bfloat16) | {name: as_jax(inputs[name], jnp.float32) for name in ("log_w", "state")}
    results = with_gradients(operator, implementation, quick=False)(
        mixed, (as_jax(cotangents[0], jnp.bfloat16), as_jax(cotangents[1], jnp.float32))
    )
    with jax.enable_x64(True):
        rounded = (
            jax.tree.map(lambda x: np.asarray(x, np.float64), mixed),
            (
                np.asarray(jnp.asarray(cotangents[0], jnp.bfloat16), np.float64),
                cotangents[1],
            ),
        )
        exact = {name: np.asarray(x) for name, x in with_gradients(operator, "scan")(*rounded).items()}
    assert results["dlog_w"].dtype == jnp.float32
    assert_close({"dlog_w": results["dlog_w"]}, {"dlog_w": exact["dlog_w"]}, 5e-6)
    assert_close(results, exact, float(jnp.finfo(jnp.bfloat16).eps) / 2)
