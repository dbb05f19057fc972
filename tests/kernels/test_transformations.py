"""What must hold for any operator, however it is computed: jit, vmap, remat, splitting, causality, independence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, assert_close
from tests.kernels import packed
from tests.kernels.operators import (
    WAYS,
    Operator,
    Results,
    Way,
    briefly,
    cut,
    definition,
    differentiate,
    each_operator,
    each_way_but_briefly,
    forward,
    gradients_of,
    named,
    problem,
    with_gradients,
)

SHAPE = packed.SHAPE
"""That of the packing tests, so that both use what was compiled once."""
UNPACKED = {"segment_ids": packed.UNPACKED, "lengths": packed.FULL}
SMALL = Shape(2, 17, 2, 4, 3)
SEGMENTS = np.array([[0] * 6 + [1] * 11, [4] * 12 + [3] * 5], np.int32)
arithmetic = pytest.mark.usefixtures("arithmetic")


@arithmetic
@each_way_but_briefly("chunked")
def test_a_call_outside_jit_gives_the_same(way: Way) -> None:
    inputs, _ = way.problem("realistic", SMALL)
    assert_close(named(*way.run(**inputs)), forward(way)(inputs, {}), way.bound)


@each_operator
def test_leaving_the_implementation_open_takes_one_of_them(float64: None, operator: Operator) -> None:
    for shape in (SMALL, SMALL._replace(time=1)):
        inputs, _ = problem(operator, "realistic", shape)
        y, _ = jax.jit(operator.run, compiler_options=QUICK)(**inputs)
        ways = [Way(operator, name) for name in ("scan", "chunked")]
        assert any(np.array_equal(y, forward(way)(inputs, {})["y"]) for way in ways)


@arithmetic
@each_way_but_briefly("wkv6-chunked", "wkv7-chunked")
def test_vmap_over_some_arguments_is_a_loop(way: Way) -> None:
    inputs, cotangents = way.problem("realistic", SHAPE)
    mapped = jax.tree.map(lambda x: np.stack([x, x[::-1]]), {name: inputs[name] for name in ("k", "v", "state")})
    ids = np.stack([packed.segment_ids(), packed.segment_ids()[::-1]])

    def run(some: Any, segment_ids: Any) -> Results:
        return differentiate(way.run, inputs | some, cotangents, UNPACKED | {"segment_ids": segment_ids})

    results = jax.jit(jax.vmap(run), compiler_options=QUICK)(mapped, ids)
    for index in range(2):
        some = jax.tree.map(lambda x: x[index], mapped)  # noqa: B023  used at once
        one = with_gradients(way)(inputs | some, cotangents, UNPACKED | {"segment_ids": ids[index]})
        assert_close({name: x[index] for name, x in results.items()}, one, way.bound)


@pytest.mark.long
@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_vmap_over_all_arguments_is_a_loop(way: Way) -> None:
    rows = [(*way.problem(case, SHAPE), packed.PACKINGS["both"]) for case in ("realistic", "slow_decay")]
    stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
    mapped = jax.jit(jax.vmap(functools.partial(differentiate, way.run)), compiler_options=QUICK)(*stacked)
    for index, row in enumerate(rows):
        assert_close({name: x[index] for name, x in mapped.items()}, with_gradients(way)(*row), way.bound)


@arithmetic
@each_way_but_briefly("wkv4-chunked", "wkv5-chunked", "wkv7-chunked")
def test_remat_changes_nothing(way: Way) -> None:
    problem, options = way.problem("realistic", SHAPE), packed.PACKINGS["both"]
    run = jax.jit(functools.partial(differentiate, jax.checkpoint(way.run)), compiler_options=QUICK)
    assert_close(run(*problem, options), with_gradients(way)(*problem, options), way.bound)


# Forward mode


@arithmetic
@pytest.mark.parametrize("way", [briefly(way, "chunked") for way in WAYS if not way.is_pallas])
def test_forward_mode_equals_that_of_the_definition(way: Way) -> None:
    inputs, _ = way.problem("realistic", SMALL)
    tangents, _ = way.problem("slow_decay", SMALL)

    def derivative(way: Way) -> Results:
        def run(inputs: Any) -> Results:
            return named(*way.run(**inputs, segment_ids=SEGMENTS))

        return jax.jit(lambda *x: jax.jvp(run, *x)[1], compiler_options=QUICK)((inputs,), (tangents,))

    assert_close(derivative(way), derivative(definition(way.operator)), 1e-12)


@arithmetic
@pytest.mark.parametrize("way", [way for way in WAYS if way.name == "chunked"], ids=str)
def test_the_hessian_times_a_vector_equals_that_of_the_definition(way: Way) -> None:
    shape = SMALL._replace(time=5, heads=1)
    inputs, (dy, _) = way.problem("realistic", shape)
    vector, _ = way.problem("slow_decay", shape)

    def product(way: Way) -> Any:
        def loss(inputs: Any) -> jax.Array:
            return jnp.sum(dy * way.run(**inputs)[0] ** 2)

        return jax.jit(lambda *x: jax.jvp(jax.grad(loss), *x)[1], compiler_options=QUICK)((inputs,), (vector,))

    assert_close(by_name(product(way)), by_name(product(definition(way.operator))), 1e-12)


def by_name(tree: Any) -> Results:
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in paths}


# Time


@arithmetic
@pytest.mark.parametrize("point", [1, 32])
@each_way_but_briefly("scan")
def test_a_sequence_may_be_split_anywhere(way: Way, point: int) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    whole = forward(way)(inputs, {})
    run = jax.jit(way.run, compiler_options=QUICK)
    first, state = run(**cut(way.operator, inputs, 0, point))
    second, state = run(**cut(way.operator, inputs, point, None) | {"state": state})
    assert_close(named(np.concatenate([first, second], axis=1), state), whole, way.bound)  # pyright: ignore


@arithmetic
@each_way_but_briefly("wkv4-chunked", "wkv6-chunked", "wkv7-chunked")
def test_gradients_flow_through_a_split(way: Way) -> None:
    def run(**inputs: Any) -> tuple[jax.Array, Any]:
        state, pieces = inputs["state"], []
        for start, stop in ((0, 33), (33, None)):
            y, state = way.run(**cut(way.operator, inputs, start, stop) | {"state": state})
            pieces.append(y)
        return jnp.concatenate(pieces, axis=1), state

    problem = way.problem("realistic", SHAPE)
    in_two = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)(*problem, {})
    assert_close(in_two, with_gradients(way)(*problem, UNPACKED), way.bound)


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_one_step_at_a_time_equals_the_sequence(way: Way) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    step, state, ys = jax.jit(way.run, compiler_options=QUICK), inputs["state"], []
    for t in range(SHAPE.time):
        y, state = step(**cut(way.operator, inputs, t, t + 1) | {"state": state})
        ys.append(y)
    assert_close(named(jnp.concatenate(ys, axis=1), state), forward(way)(inputs, {}), way.bound)


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_no_state_is_the_empty_state(way: Way) -> None:
    inputs, _ = way.problem("realistic", SMALL)
    without = forward(way)(inputs | {"state": None}, {})
    empty = forward(way)(inputs | {"state": way.operator.empty_like(inputs["state"])}, {})
    for name, x in without.items():
        np.testing.assert_array_equal(x, empty[name], err_msg=name)


# Who sees whom


def only_where(way: Way, case: str, *index: Any) -> Results:
    """Results and gradients at SHAPE when nothing but y at an index has a cotangent."""
    inputs, (dy, dstate) = way.problem(case, SHAPE)
    only = np.zeros_like(dy)
    only[index] = dy[index]
    return with_gradients(way)(inputs, (only, jax.tree.map(np.zeros_like, dstate)), UNPACKED)


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_a_step_depends_on_no_later_one(way: Way) -> None:
    for step in (0, 15, 16, 31, 32, 64, 68):
        results = only_where(way, "realistic", slice(None), step)
        for name in way.operator.over_time:
            gradient = np.asarray(results[f"d{name}"])
            later = np.max(np.abs(gradient[:, step + 1 :]))
            # Sums of log w around a chunk's middle row reach over later steps, whose parts in them cancel but for
            # rounding.
            assert later <= (way.bound if name == "log_w" else 0), (name, step)
            assert step == 0 or np.any(gradient[:, : step + 1] != 0), (name, step)
        for name in way.operator.reads_with:
            assert np.all(np.asarray(results[f"d{name}"])[:, :step] == 0), (name, step)


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_every_earlier_step_reaches_a_later_one(way: Way) -> None:
    results = only_where(way, "slow_decay", slice(None), -1)
    values = np.asarray(results["dv"])
    assert np.all(np.any(values != 0, axis=tuple(range(2, values.ndim))))
    assert all(np.any(gradient != 0) for gradient in gradients_of(results, "state"))


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_rows_and_heads_do_not_see_each_other(way: Way) -> None:
    results = only_where(way, "realistic", 1, slice(None), 0)
    expected = {name: (1, slice(None), 0) for name in way.operator.over_time}
    expected |= {name: (0,) for name in way.operator.per_head} | {"state": (1, 0)}
    for name, index in expected.items():
        for gradient in gradients_of(results, name):
            elsewhere = gradient.copy()
            elsewhere[index] = 0
            assert np.any(gradient[index] != 0), name
            assert np.all(elsewhere == 0), name


@arithmetic
@each_way_but_briefly("scan", "chunked")
def test_zero_cotangents_give_zero_gradients(way: Way) -> None:
    inputs, cotangents = way.problem("realistic", SHAPE)
    results = with_gradients(way)(inputs, jax.tree.map(np.zeros_like, cotangents), UNPACKED)
    for name in inputs:
        assert all(np.all(gradient == 0) for gradient in gradients_of(results, name)), name
