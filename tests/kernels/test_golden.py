"""Operators against numbers from other people's implementations; shared/golden/README.md explains the keys."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_kernels import wkv7
from tests.golden import QUICK, assert_close, load_golden
from tests.kernels.operators import OPERATORS

Arrays = dict[str, Array]


def golden_wkv7(inputs: Arrays, implementation: str) -> Arrays:
    # The files hold w_raw with decay = e^{-e^{w_raw}}.
    log_w = -jnp.exp(inputs["w_raw"])
    r, k, v, a, b, state = (inputs[name] for name in ("r", "k", "v", "a", "b", "S"))
    y, state = wkv7(r, log_w, k, v, a, b, state, implementation=implementation)
    return {"y": y, "S_T": state}


RUN: dict[str, Callable[[Arrays, str], Arrays]] = {"wkv7": golden_wkv7}
CASES = {
    # `beyond` has decays below any that a model makes.
    "wkv7": ("c0_basic", "c1_zero", "c2_extreme", "c3_generic", "c4_beyond", "c5_basic", "c6_basic"),
}


def rows(*kinds: str) -> list:
    """Every operator and implementation with its cases of these kinds."""
    return [
        pytest.param(operator.name, implementation, case, id=f"{operator}-{implementation}-{case}")
        for operator in OPERATORS
        for case in CASES[operator.name]
        for implementation in operator.implementations
        if case.endswith(kinds)
    ]


@functools.cache
def compiled(operator: str, implementation: str, quick: bool) -> Callable[..., tuple[Arrays, Arrays]]:
    def results(inputs: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
        values, pull_back = jax.vjp(lambda inputs: RUN[operator](inputs, implementation), inputs)
        return values, pull_back(cotangents)[0]

    return jax.jit(results, compiler_options=QUICK if quick else None)


def check(
    operator: str, implementation: str, case: str, dtype: type, value_bound: float, gradient_bound: float
) -> None:
    golden = load_golden(f"op/{operator}_s0.npz")

    def part(kind: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"{case}.{kind}."): x for key, x in golden.items() if key.startswith(f"{case}.{kind}.")
        }

    run = compiled(operator, implementation, quick=dtype == np.float64)
    inputs, cotangents = ({name: jnp.asarray(x, dtype) for name, x in part(kind).items()} for kind in ("in", "ct"))
    values, from_y = run(inputs, {"y": cotangents["gy"], "S_T": jnp.zeros_like(cotangents["gS"])})
    assert_close(values, part("out"), value_bound)
    assert_close(from_y, part("g"), gradient_bound)
    if expected := part("h"):  # some cases have no gradients through the final state
        _, from_both = run(inputs, {"y": cotangents["gy"], "S_T": cotangents["gS"]})
        assert_close(from_both, expected, gradient_bound)


@pytest.mark.parametrize(("operator", "implementation", "case"), rows(""))
def test_float64_equals_other_implementations(float64: None, operator: str, implementation: str, case: str) -> None:
    check(operator, implementation, case, np.float64, value_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.parametrize(("operator", "implementation", "case"), rows("extreme", "generic", "beyond"))
def test_float32_is_close_to_other_implementations(operator: str, implementation: str, case: str) -> None:
    check(operator, implementation, case, np.float32, value_bound=2e-6, gradient_bound=5e-6)
