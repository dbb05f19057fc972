"""The definitions against the equations of the papers, written with matrices, in NumPy, one row and head at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_kernels.testing.cases import Shape
from tests.kernels.operators import OPERATORS, definition, forward, problem

SMALL = Shape(2, 4, 3, 6, 5)
BY_NAME = {operator.name: operator for operator in OPERATORS}
Step = Callable[..., tuple[NDArray, NDArray]]


def step_of_wkv5_and_6(state: NDArray, r: NDArray, log_w: NDArray, k: NDArray, v: NDArray, u: NDArray) -> Any:
    """y = (S + v (u k)^T) r; S <- S diag(w) + v k^T."""
    return state @ np.diag(np.exp(log_w)) + np.outer(v, k), (state + np.outer(v, u * k)) @ r


def step_of_wkv7(state: NDArray, r: NDArray, log_w: NDArray, k: NDArray, v: NDArray, a: NDArray, b: NDArray) -> Any:
    """S <- S (diag(w) + a b^T) + v k^T; y = S r."""
    state = state @ (np.diag(np.exp(log_w)) + np.outer(a, b)) + np.outer(v, k)
    return state, state @ r


MATRIX_STEPS: dict[str, Step] = {"wkv5": step_of_wkv5_and_6, "wkv6": step_of_wkv5_and_6, "wkv7": step_of_wkv7}


@pytest.mark.parametrize(("name", "step"), MATRIX_STEPS.items(), ids=MATRIX_STEPS)
def test_matrix_states(name: str, step: Step) -> None:
    operator = BY_NAME[name]
    inputs, _ = problem(operator, "realistic", SMALL)
    with jax.enable_x64(True):
        results = jax.tree.map(np.asarray, forward(definition(operator))(inputs, {}))
    names = [parameter for parameter in inputs if parameter != "state"]
    for row in range(SMALL.batch):
        for head in range(SMALL.heads):
            state = inputs["state"][row, head]
            for t in range(SMALL.time):
                vectors = {x: inputs[x][head] if x in operator.per_head else inputs[x][row, t, head] for x in names}
                state, expected = step(state, **vectors)
                np.testing.assert_allclose(results["y"][row, t, head], expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(results["state"][row, head], state, rtol=1e-12, atol=1e-12)


def test_wkv4_is_a_mean_of_values_weighted_by_keys_and_age() -> None:
    operator = BY_NAME["wkv4"]
    inputs, _ = problem(operator, "realistic", SMALL)
    with jax.enable_x64(True):
        results = jax.tree.map(np.asarray, forward(definition(operator))(inputs, {}))
    log_w, u, k, v = (inputs[name] for name in ("log_w", "u", "k", "v"))
    scale = np.exp(inputs["state"][2])
    numerator, denominator = inputs["state"][0] * scale, inputs["state"][1] * scale
    for t in range(SMALL.time):
        present = np.exp(u + k[:, t])
        expected = (numerator + present * v[:, t]) / (denominator + present)
        np.testing.assert_allclose(results["y"][:, t], expected, rtol=1e-12)
        numerator = np.exp(log_w) * numerator + np.exp(k[:, t]) * v[:, t]
        denominator = np.exp(log_w) * denominator + np.exp(k[:, t])
    scale = np.exp(results["state.2"])
    np.testing.assert_allclose(results["state.0"] * scale, numerator, rtol=1e-12)
    np.testing.assert_allclose(results["state.1"] * scale, denominator, rtol=1e-12)
