"""What is special to WKV-4: a state of three numbers, of which two are free to be scaled by the third."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.testing.cases import Shape
from tests.golden import assert_close
from tests.kernels.operators import WAYS, Way, forward, with_gradients

SHAPE = Shape(2, 17, 2, 4, 3)
WKV4_WAYS = [way for way in WAYS if way.operator.name == "wkv4"]
each_way = pytest.mark.parametrize("way", WKV4_WAYS, ids=str)
pytestmark = pytest.mark.usefixtures("arithmetic")


@each_way
def test_a_cotangent_of_the_exponent_is_ignored(way: Way) -> None:
    inputs, (dy, (dnumerator, ddenominator, dexponent)) = way.problem("realistic", SHAPE)
    results = with_gradients(way)(inputs, (dy, (dnumerator, ddenominator, dexponent)), {})
    without = with_gradients(way)(inputs, (dy, (dnumerator, ddenominator, 0 * dexponent)), {})
    for name, x in results.items():
        np.testing.assert_array_equal(x, without[name], err_msg=name)


@each_way
def test_the_same_state_over_another_exponent_gives_the_same(way: Way) -> None:
    inputs, cotangents = way.problem("realistic", SHAPE)
    numerator, denominator, exponent = inputs["state"]
    shift = np.log(np.asarray(4, way.dtype))
    shifted = inputs | {"state": (numerator * 4, denominator * 4, exponent - shift)}
    read = ["y", *(f"d{name}" for name in ("log_w", "u", "k", "v"))]
    # The final state's exponent may differ too, and cotangents are given for one exponent: read y alone.
    only_y = (cotangents[0], jax.tree.map(np.zeros_like, cotangents[1]))
    results, expected = (with_gradients(way)(x, only_y, {}) for x in (shifted, inputs))
    assert_close({name: results[name] for name in read}, {name: expected[name] for name in read}, 2 * way.bound)
    np.testing.assert_allclose(results["dstate.0"] * 4, expected["dstate.0"], rtol=1e-4)


@each_way
def test_an_empty_state_may_be_written_with_minus_infinity(way: Way) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    zeros = np.zeros_like(inputs["state"][0])
    results = forward(way)(inputs | {"state": (zeros, zeros, np.full_like(zeros, -np.inf))}, {})
    for name, x in forward(way)(inputs | {"state": None}, {}).items():
        np.testing.assert_array_equal(results[name], x, err_msg=name)


@each_way
def test_nothing_overflows_whatever_the_keys(way: Way) -> None:
    inputs, cotangents = way.problem("realistic", SHAPE)
    inputs = jax.tree.map(lambda x: x.astype(np.float32), inputs)
    for key in (-1e4, 1e4):
        results = with_gradients(way)(inputs | {"k": inputs["k"] + np.float32(key)}, cast(cotangents), {})
        for name, x in results.items():
            assert np.all(np.isfinite(x)), name


def cast(tree: object) -> object:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
