"""The choice of arithmetic for products inside an operator."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.matmul import Matmul, interpreted_matmul, triton_matmul
from rwkv_kernels.precision import Precision
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, relative_error
from tests.kernels.operators import (
    OPERATORS,
    WAYS,
    Operator,
    Results,
    Way,
    as_jax,
    differentiate,
    problem,
    reference,
)

SHAPE = Shape(2, 70, 1, 16, 16)
WITH_CHOICE = [way for way in WAYS if way.operator.has_precisions]
BOUNDS: dict[Precision, float] = {"full": 1e-5, "default": 2e-4, "fast": 6e-2}


def results(way: Way, precision: Precision) -> Results:
    """Results and gradients of a case in float32."""

    def run(**arguments: Any) -> tuple[jax.Array, Any]:
        return way.run(**arguments, precision=precision)

    compiled = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)
    return compiled(*as_jax(problem(way.operator, "realistic", SHAPE), jnp.float32), {})


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way.name == "pallas_triton" else pytest.mark.long, id=str(way))
        for way in WITH_CHOICE
        if way.is_pallas
    ],
)
def test_kernels_are_less_exact_the_faster_they_may_be(way: Way) -> None:
    # Interpreted, `default` and `fast` round as the tensor cores of an NVIDIA GPU do.
    exact = reference(way.operator, "realistic", SHAPE)
    worst = {}
    for precision in BOUNDS:
        found = results(way, precision)
        worst[precision] = max(relative_error(found[name], exact[name]) for name in exact)
    assert worst["full"] < worst["default"] < worst["fast"]
    assert all(worst[precision] <= bound for precision, bound in BOUNDS.items()), worst


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others have several arithmetics")
@pytest.mark.parametrize("way", [way for way in WITH_CHOICE if not way.is_pallas], ids=str)
def test_a_cpu_has_one_arithmetic_only(way: Way) -> None:
    inputs = as_jax(problem(way.operator, "realistic", SHAPE)[0], jnp.float32)
    run = jax.jit(way.run, static_argnames="precision", compiler_options=QUICK)
    full, state = run(**inputs, precision="full")
    for precision in ("default", "fast"):
        y, final = run(**inputs, precision=precision)
        np.testing.assert_array_equal(y, full)
        np.testing.assert_array_equal(final, state)


@pytest.mark.parametrize("operator", [x for x in OPERATORS if x.has_precisions], ids=str)
def test_a_word_that_is_no_precision_is_refused(operator: Operator) -> None:
    inputs = as_jax(problem(operator, "realistic", SHAPE)[0], jnp.float32)
    with pytest.raises(ValueError, match="precision = 'tf32': must be one of full, default, fast"):
        operator.run(**inputs, precision="tf32")


# Operands that are bfloat16 already


def number_of_products(precision: Precision, values: str) -> int:
    """Matrix products that one of a Triton kernel takes, with x and y named in values bfloat16."""
    matmul = triton_matmul(precision)._replace(own_derivatives=False, bfloat16_values=True)
    tile = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    traced = jax.make_jaxpr(lambda x, y: matmul.nn(x, y, values))(tile, tile)
    return sum(equation.primitive.name == "dot_general" for equation in traced.eqns)


def test_values_in_bfloat16_take_fewer_passes() -> None:
    # Of two float32 tiles, the six or three passes are the compiler's.
    found = {
        precision: [number_of_products(precision, values) for values in ("", "x", "y", "xy")] for precision in BOUNDS
    }
    assert found == {"full": [1, 3, 3, 1], "default": [1, 2, 2, 1], "fast": [1, 1, 1, 1]}


@pytest.mark.parametrize("values", ["x", "y", "z", "xyz"])
@pytest.mark.parametrize("form", ["nn", "nt", "tn"])
def test_products_with_values_in_bfloat16_are_the_same(form: str, values: str) -> None:
    rng = np.random.default_rng(0)
    x, y, dz = (jnp.asarray(rng.standard_normal((8, 8)), jnp.bfloat16).astype(jnp.float32) for _ in range(3))
    plain = interpreted_matmul("full")

    def derivative(matmul: Matmul) -> Any:
        z, pull_back = jax.vjp(lambda x, y: getattr(matmul, form)(x, y, values), x, y)
        return z, *pull_back(dz)

    for one, other in zip(derivative(plain._replace(bfloat16_values=True)), derivative(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_value_that_is_not_bfloat16_would_be_rounded() -> None:
    x, y = jnp.full((8, 8), 1 + 2**-12, jnp.float32), jnp.eye(8, dtype=jnp.float32)
    matmul = interpreted_matmul("full")._replace(bfloat16_values=True)
    np.testing.assert_array_equal(matmul.nn(x, y), x)
    np.testing.assert_array_equal(matmul.nn(x, y, "x"), jnp.ones_like(x))
