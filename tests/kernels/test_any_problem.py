"""Problems that nobody chose: any sizes, segments, lengths and points to split at, against the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_kernels.testing.cases import Shape
from tests.golden import assert_close
from tests.kernels.operators import Operator, Way, each_operator, exactly, forward, problem, with_gradients


class Drawn(NamedTuple):
    """A problem and how it is packed."""

    shape: Shape
    case: int
    segment_ids: np.ndarray
    lengths: np.ndarray
    point: int
    """Where the sequence is split."""


@st.composite
def drawn_problems(draw: st.DrawFn) -> Drawn:
    def number(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    shape = Shape(number(1, 3), number(1, 80), number(1, 3), number(1, 9), number(1, 9))
    rng = np.random.default_rng(number(0, 2**32 - 1))
    ids = np.cumsum(rng.random((shape.batch, shape.time)) < rng.choice([0.02, 0.3]), axis=1) % 3
    lengths = rng.integers(0, shape.time + 1, shape.batch)
    return Drawn(shape, number(0, 99), ids.astype(np.int32), lengths, number(0, shape.time))


def check(operator: Operator, drawn: Drawn) -> None:
    case = operator.cases[drawn.case % len(operator.cases)]
    inputs, cotangents = problem(operator, case, drawn.shape)
    options = {"segment_ids": drawn.segment_ids, "lengths": drawn.lengths}
    chunked = Way(operator, "chunked")
    expected = exactly(operator, inputs, cotangents, options)
    assert_close(with_gradients(chunked)(inputs, cotangents, options), expected, 1e-11)
    in_two = split(chunked, inputs, drawn)
    assert_close(in_two, {name: expected[name] for name in in_two}, 1e-11)


def split(way: Way, inputs: dict[str, Any], drawn: Drawn) -> dict[str, Any]:
    """Results of two calls, the second of which goes on from the state of the first."""
    operator, point, time = way.operator, drawn.point, drawn.shape.time
    ids = drawn.segment_ids
    first = forward(way)(inputs, {"segment_ids": ids, "lengths": np.minimum(drawn.lengths, point)})
    # Rolled, so that both calls have one shape: what comes before the point now lies beyond the lengths.
    rolled = {name: np.roll(inputs[name], -point, axis=1) for name in operator.over_time}
    state = jax.tree.unflatten(
        jax.tree.structure(inputs["state"]), [np.asarray(x) for name, x in first.items() if name != "y"]
    )
    if 0 < point < time:  # a segment that begins with the second call begins empty, if it begins at all
        begins = (ids[:, point] != ids[:, point - 1]) & (drawn.lengths > point)
        state = jax.tree.map(
            lambda x, empty: np.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), empty, x),
            state,
            operator.empty_like(state),
        )
    options = {"segment_ids": np.roll(ids, -point, axis=1), "lengths": np.maximum(drawn.lengths - point, 0)}
    second = forward(way)(inputs | rolled | {"state": state}, options)
    y = np.concatenate([first["y"][:, :point], second["y"][:, : time - point]], axis=1)
    return second | {"y": y}


ANY_TIME = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)


@each_operator
def test_a_problem_that_nobody_chose(operator: Operator) -> None:
    @settings(ANY_TIME, max_examples=2)
    @given(drawn_problems())
    def some(drawn: Drawn) -> None:
        with jax.enable_x64(True):
            check(operator, drawn)

    some()


@pytest.mark.long
@each_operator
def test_many_problems_that_nobody_chose(operator: Operator) -> None:
    @settings(ANY_TIME, max_examples=50, derandomize=False)
    @given(drawn_problems())
    def many(drawn: Drawn) -> None:
        with jax.enable_x64(True):
            check(operator, drawn)

    many()
