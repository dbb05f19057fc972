"""What is special to WKV-5: a decay that all tokens share, and may share with all channels of a head."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_kernels.testing.cases import Shape
from tests.golden import assert_close, relative_error
from tests.kernels.operators import WAYS, Way, briefly, forward, with_gradients

SHAPE = Shape(2, 17, 2, 4, 3)
each_way = pytest.mark.parametrize("way", [way for way in WAYS if way.operator.name == "wkv5"], ids=str)
pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.mark.parametrize(
    "way", [briefly(way, "scan", "chunked", "pallas_triton") for way in WAYS if way.operator.name == "wkv5"]
)
def test_one_decay_a_head_is_that_decay_in_every_channel(way: Way) -> None:
    inputs, cotangents = way.problem("one_decay_per_head", SHAPE)
    assert inputs["log_w"].shape == inputs["u"].shape == (2, 1)
    repeated = inputs | {name: np.repeat(inputs[name], SHAPE.key_dim, axis=1) for name in ("log_w", "u")}
    results, expected = (with_gradients(way)(x, cotangents, {}) for x in (inputs, repeated))
    for name in ("dlog_w", "du"):
        summed = np.sum(expected.pop(name), axis=1, keepdims=True)
        assert relative_error(results.pop(name), summed) <= way.bound
    assert_close(results, expected, way.bound)


@each_way
def test_it_is_wkv6_with_the_same_decay_at_every_step(way: Way) -> None:
    inputs, _ = way.problem("realistic", SHAPE)
    wkv6 = next(other for other in WAYS if other.operator.name == "wkv6" and other.name == way.name)
    repeated = np.broadcast_to(inputs["log_w"], inputs["r"].shape)
    assert_close(forward(way)(inputs, {}), forward(wkv6)(inputs | {"log_w": repeated}, {}), way.bound)
