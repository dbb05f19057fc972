"""The choice of arithmetic for products inside an operator."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
BOUNDS = {"full": 1e-5, "default": 1e-2, "fast": 6e-2}


def results(way: Way, precision: str) -> Results:
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
