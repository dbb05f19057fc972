"""Operators against numbers from other people's implementations; shared/golden/README.md explains the keys."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_kernels import wkv7
from tests.golden import assert_close, load_golden
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
ROWS = [
    pytest.param(operator.name, implementation, case, id=f"{operator}-{implementation}-{case}")
    for operator in OPERATORS
    for case in CASES[operator.name]
    for implementation in operator.implementations
]


def check(
    operator: str, implementation: str, case: str, dtype: type, value_bound: float, gradient_bound: float
) -> None:
    golden = load_golden(f"op/{operator}_s0.npz")

    def part(kind: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"{case}.{kind}."): x for key, x in golden.items() if key.startswith(f"{case}.{kind}.")
        }

    @jax.jit
    def results(inputs: Arrays, dy: Array, dstate: Array) -> tuple[Arrays, Arrays, Arrays]:
        values, pull_back = jax.vjp(lambda inputs: RUN[operator](inputs, implementation), inputs)
        from_y = pull_back({"y": dy, "S_T": jnp.zeros_like(dstate)})[0]
        return values, from_y, pull_back({"y": dy, "S_T": dstate})[0]

    cotangents = part("ct")
    values, from_y, from_both = results(
        {name: jnp.asarray(x, dtype) for name, x in part("in").items()},
        jnp.asarray(cotangents["gy"], dtype),
        jnp.asarray(cotangents["gS"], dtype),
    )
    assert_close(values, part("out"), value_bound)
    assert_close(from_y, part("g"), gradient_bound)
    if expected := part("h"):  # two of the cases have no gradients through the final state
        assert_close(from_both, expected, gradient_bound)


@pytest.mark.parametrize(("operator", "implementation", "case"), ROWS)
def test_float64_equals_other_implementations(float64: None, operator: str, implementation: str, case: str) -> None:
    check(operator, implementation, case, np.float64, value_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.parametrize(("operator", "implementation", "case"), ROWS)
def test_float32_is_close_to_other_implementations(operator: str, implementation: str, case: str) -> None:
    check(operator, implementation, case, np.float32, value_bound=2e-6, gradient_bound=5e-6)
