"""What must hold for any operator, however it is computed: jit, vmap, remat, splitting, causality, independence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.wkv7.cases import Shape
from tests.golden import QUICK, assert_close, relative_error
from tests.kernels.operators import (
    OPERATORS,
    Operator,
    at,
    cut,
    differentiate,
    each_pair,
    forward,
    make_cotangents,
    problem,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = Shape(2, 64, 2, 8, 6)
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


@each_pair
def test_a_call_outside_jit_gives_the_same(operator: Operator, implementation: str) -> None:
    inputs, _ = problem(operator, "realistic", SHAPE)
    y, state = operator.run(**jax.tree.map(jnp.asarray, inputs), implementation=implementation)
    jitted_y, jitted_state = forward(operator, implementation)(inputs)
    assert relative_error(y, jitted_y) < 1e-13
    assert relative_error(state, jitted_state) < 1e-13


@each_operator
def test_leaving_the_implementation_open_takes_one_of_them(operator: Operator) -> None:
    for shape in (SHAPE, SHAPE._replace(time=1)):
        inputs, _ = problem(operator, "realistic", shape)
        y, _ = jax.jit(operator.run, compiler_options=QUICK)(**inputs)
        candidates = [forward(operator, implementation)(inputs)[0] for implementation in operator.implementations]
        assert any(np.array_equal(y, candidate) for candidate in candidates)


@each_pair
def test_vmap_is_a_loop(operator: Operator, implementation: str) -> None:
    rows = [problem(operator, case, SHAPE) for case in ("realistic", "slow_decay", "aligned_keys")]
    stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
    run = functools.partial(operator.run, implementation=implementation)
    mapped = jax.jit(jax.vmap(functools.partial(differentiate, run)), compiler_options=QUICK)(*stacked)
    for index, row in enumerate(rows):
        one = with_gradients(operator, implementation)(*row)
        assert_close({name: x[index] for name, x in mapped.items()}, one, 1e-13)


@each_pair
def test_remat_changes_nothing(operator: Operator, implementation: str) -> None:
    inputs, cotangents = problem(operator, "realistic", SHAPE)

    run = jax.checkpoint(functools.partial(operator.run, implementation=implementation))
    with_remat = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)
    assert_close(with_remat(inputs, cotangents), with_gradients(operator, implementation)(inputs, cotangents), 1e-13)


@each_pair
@pytest.mark.parametrize("point", [1, 31, 32, 33, 63])
def test_a_sequence_may_be_split_anywhere(operator: Operator, implementation: str, point: int) -> None:
    inputs, _ = problem(operator, "realistic", SHAPE)
    run = forward(operator, implementation)
    whole, final = run(inputs)
    first, state = run(cut(operator, inputs, 0, point))
    second, state = run(cut(operator, inputs, point, None) | {"state": state})
    assert relative_error(np.concatenate([first, second], axis=1), whole) < 1e-12
    assert relative_error(state, final) < 1e-12


@each_pair
def test_gradients_flow_through_a_split(operator: Operator, implementation: str) -> None:
    inputs, cotangents = problem(operator, "realistic", SHAPE)

    def run(**inputs: Any) -> tuple[jax.Array, Any]:
        state, pieces = inputs["state"], []
        for start, stop in ((0, 33), (33, None)):
            piece = cut(operator, inputs, start, stop) | {"state": state}
            y, state = operator.run(**piece, implementation=implementation)
            pieces.append(y)
        return jnp.concatenate(pieces, axis=1), state

    in_two = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)
    assert_close(in_two(inputs, cotangents), with_gradients(operator, implementation)(inputs, cotangents), 1e-12)


@each_pair
def test_one_step_at_a_time_equals_the_sequence(operator: Operator, implementation: str) -> None:
    inputs, _ = problem(operator, "realistic", SHAPE)
    whole, final = forward(operator, implementation)(inputs)
    step, state, ys = jax.jit(operator.step, compiler_options=QUICK), inputs["state"], []
    for t in range(SHAPE.time):
        y, state = step(**at(operator, inputs, t) | {"state": state})
        ys.append(y)
    assert relative_error(np.stack(ys, axis=1), whole) < 1e-12
    assert relative_error(state, final) < 1e-12


@each_pair
def test_no_state_is_a_state_of_zeros(operator: Operator, implementation: str) -> None:
    inputs, _ = problem(operator, "realistic", SHAPE)
    empty = jax.tree.map(np.zeros_like, inputs["state"])
    run = forward(operator, implementation)
    for without, zeros in zip(run(inputs | {"state": None}), run(inputs | {"state": empty}), strict=True):
        np.testing.assert_array_equal(without, zeros)


@each_operator
def test_a_step_without_state_starts_from_zeros(operator: Operator) -> None:
    inputs = at(operator, problem(operator, "realistic", SHAPE)[0], 0)
    empty = jax.tree.map(np.zeros_like, inputs["state"])
    for without, zeros in zip(
        operator.step(**inputs | {"state": None}), operator.step(**inputs | {"state": empty}), strict=True
    ):
        np.testing.assert_array_equal(without, zeros)


@each_pair
@pytest.mark.parametrize("step", [0, 15, 31, 32, 62])
def test_a_step_depends_on_no_later_one(operator: Operator, implementation: str, step: int) -> None:
    inputs, (dy, dstate) = problem(operator, "realistic", SHAPE)
    only = np.zeros_like(dy)
    only[:, step] = dy[:, step]
    results = with_gradients(operator, implementation)(inputs, (only, jax.tree.map(np.zeros_like, dstate)))
    for name in operator.over_time:
        gradient = np.asarray(results[f"d{name}"])
        assert np.all(gradient[:, step + 1 :] == 0), name
        assert np.any(gradient[:, : step + 1] != 0), name
    # y_t may read what step t wrote, but what it reads with is its own.
    assert np.all(np.asarray(results["dr"])[:, :step] == 0)


@each_pair
def test_every_earlier_step_reaches_a_later_one(operator: Operator, implementation: str) -> None:
    inputs, (dy, dstate) = problem(operator, "slow_decay", SHAPE)
    only = np.zeros_like(dy)
    only[:, -1] = dy[:, -1]
    results = with_gradients(operator, implementation)(inputs, (only, jax.tree.map(np.zeros_like, dstate)))
    assert np.all(np.any(np.asarray(results["dv"]) != 0, axis=(2, 3)))
    assert np.any(np.asarray(results["dstate"]) != 0)


@each_pair
def test_rows_and_heads_do_not_see_each_other(operator: Operator, implementation: str) -> None:
    inputs, (dy, dstate) = problem(operator, "realistic", SHAPE)
    only = np.zeros_like(dy)
    only[1, :, 0] = dy[1, :, 0]
    results = with_gradients(operator, implementation)(inputs, (only, jax.tree.map(np.zeros_like, dstate)))
    for name in operator.over_time:
        gradient = np.asarray(results[f"d{name}"]).copy()
        assert np.any(gradient[1, :, 0] != 0), name
        gradient[1, :, 0] = 0
        assert np.all(gradient == 0), name
    state = np.asarray(results["dstate"]).copy()
    state[1, 0] = 0
    assert np.all(state == 0)


@each_pair
def test_zero_cotangents_give_zero_gradients(operator: Operator, implementation: str) -> None:
    inputs, _ = problem(operator, "realistic", SHAPE)
    zeros = jax.tree.map(np.zeros_like, make_cotangents(operator, inputs))
    results = with_gradients(operator, implementation)(inputs, zeros)
    for name in inputs:
        assert np.all(np.asarray(results[f"d{name}"]) == 0), name
