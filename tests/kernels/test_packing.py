"""Several sequences in one row, and rows of different lengths: as if each sequence had been run alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from tests.golden import assert_close
from tests.kernels.operators import (
    Inputs,
    Operator,
    Results,
    Way,
    cut,
    each_way_but_briefly,
    exactly,
    gradients_of,
    problem,
    unchanged,
    with_gradients,
)
from tests.kernels.packed import BOUNDS, FULL, LENGTHS, PACKINGS, SHAPE, UNPACKED

pytestmark = pytest.mark.usefixtures("arithmetic")


def run(way: Way, options: dict[str, Any], inputs: Inputs | None = None, cotangents: Any = None) -> Results:
    given, default = way.problem("realistic", SHAPE)
    return with_gradients(way)(
        given if inputs is None else inputs, default if cotangents is None else cotangents, options
    )


@functools.cache
def one_after_the_other(operator: Operator, packing: str) -> Results:
    """What the definition gives when every segment is run alone, put together."""
    inputs, (dy, dstate) = problem(operator, "realistic", SHAPE)
    together: dict[str, Any] = {"y": np.zeros_like(dy)}
    together |= {f"d{name}": np.zeros_like(inputs[name]) for name in (*operator.over_time, *operator.per_head)}
    states: list[Results] = []
    for row in range(SHAPE.batch):
        here = {name: x if name in operator.per_head else only_row(x, row) for name, x in inputs.items()}
        dfinal = only_row(dstate, row)
        states.append(of_states("state", here["state"]) | unchanged(here, dfinal))
        for start, stop, is_last in segments(PACKINGS[packing], row):
            alone = cut(operator, here, start, stop) | ({"state": operator.empty_like(here["state"])} if start else {})
            dlast = dfinal if is_last else jax.tree.map(np.zeros_like, dfinal)
            results = exactly(operator, alone, (dy[row : row + 1, start:stop], dlast))
            for name, x in results.items():
                if name.startswith("state") or (name.startswith("dstate") and not start):
                    states[-1][name] = x
                elif name.removeprefix("d") in operator.per_head:
                    together[name] += x
                elif not name.startswith("dstate"):
                    together[name][row : row + 1, start:stop] = x
    return together | {name: np.concatenate([row[name] for row in states]) for name in states[0]}


def only_row(tree: Any, row: int) -> Any:
    return jax.tree.map(lambda x: x[row : row + 1], tree)


def segments(packing: dict[str, np.ndarray], row: int) -> list[tuple[int, int, bool]]:
    """Start and end of each segment of a row, and whether it is the last."""
    length = packing["lengths"][row]
    changes = np.flatnonzero(np.diff(packing["segment_ids"][row, :length])) + 1
    edges = [0, *changes, length] if length else []
    return [(start, stop, stop == length) for start, stop in itertools.pairwise(edges)]


def of_states(name: str, state: Any) -> Results:
    """The parts of a state, by name as results have them."""
    paths = jax.tree.leaves_with_path({name: state})
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


@pytest.mark.parametrize("packing", PACKINGS)
@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_a_packed_row_equals_its_parts_run_alone(way: Way, packing: str) -> None:
    expected = one_after_the_other(way.operator, packing)
    assert_close(run(way, PACKINGS[packing]), expected, way.bound)


@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_one_segment_of_full_length_changes_nothing(way: Way) -> None:
    plain = with_gradients(way)(*way.problem("realistic", SHAPE), {})
    assert_close(run(way, {"segment_ids": UNPACKED + 3, "lengths": FULL}), plain, way.bound)


@pytest.mark.parametrize("case", ["realistic", "slow_decay"])  # whose chunks may be computed in different ways
@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_nothing_leaks_between_segments(way: Way, case: str) -> None:
    inputs, (dy, dstate) = way.problem(case, SHAPE)
    for row, start, stop in ((0, 2, 16), (0, 16, 32), (0, 64, 65), (0, 65, 70), (1, 17, 33), (1, 33, 47), (1, 47, 61)):
        only = np.zeros_like(dy)
        only[row, start:stop] = dy[row, start:stop]
        results = run(way, PACKINGS["segments"], inputs, (only, jax.tree.map(np.zeros_like, dstate)))
        assert np.any(np.asarray(results["dv"])[row, start:stop] != 0)
        for name in way.operator.over_time:
            elsewhere = np.asarray(results[f"d{name}"]).copy()
            elsewhere[row, start:stop] = 0
            assert np.all(elsewhere == 0), (name, row, start)
        assert all(np.all(gradient == 0) for gradient in gradients_of(results, "state"))


@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_the_final_state_is_that_of_the_last_segment_alone(way: Way) -> None:
    inputs, (dy, dstate) = way.problem("slow_decay", SHAPE)
    results = run(way, PACKINGS["segments"], inputs, (np.zeros_like(dy), dstate))
    last = BOUNDS[0][-1]
    assert np.all(np.asarray(results["dv"])[0, :last] == 0)
    assert np.any(np.asarray(results["dv"])[0, last:] != 0)
    assert all(np.all(gradient[:3] == 0) for gradient in gradients_of(results, "state"))
    assert all(np.any(gradient[3] != 0) for gradient in gradients_of(results, "state"))


@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_nothing_beyond_a_length_is_read(way: Way) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    beyond = np.arange(SHAPE.time) >= LENGTHS[:, None]

    def with_garbage(value: float) -> Inputs:
        garbage = {name: inputs[name].copy() for name in way.operator.over_time}
        for x in garbage.values():
            x[beyond] = value
        return inputs | garbage

    clean = run(way, PACKINGS["lengths"])
    assert np.all(np.asarray(clean["y"])[beyond] == 0)
    for value in (np.nan, np.inf, -1e30):
        results = run(way, PACKINGS["lengths"], with_garbage(value))
        for name, x in clean.items():
            np.testing.assert_array_equal(results[name], x, err_msg=name)
    for name in way.operator.over_time:
        assert np.all(np.asarray(clean[f"d{name}"])[beyond] == 0), name


@each_way_but_briefly("wkv7-scan", "chunked", "wkv7-associative_scan", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
def test_a_segment_that_changes_beyond_the_length_does_not_restart_the_state(way: Way) -> None:
    ids = UNPACKED.copy()
    ids[2, LENGTHS[2] :] = 1
    ids[3, LENGTHS[3] + 3] = 5
    expected = run(way, PACKINGS["lengths"])
    results = run(way, {"segment_ids": ids, "lengths": LENGTHS})
    for name, x in expected.items():
        np.testing.assert_array_equal(results[name], x, err_msg=name)
