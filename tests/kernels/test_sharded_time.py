"""Time split over a mesh axis: the same values and gradients as of the whole sequence on one device."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.kernels.operators import Way, briefly
from tests.kernels.sharded_time import CASES, WAYS_HERE
from tests.kernels.test_sharding import run_on_four_devices


@functools.cache
def found(name: str) -> dict[str, Any]:
    """What the program finds about each operator's implementation of this name."""
    return run_on_four_devices("tests.kernels.sharded_time", *(str(way) for way in WAYS_HERE if way.name == name))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [briefly(way, "chunked") for way in WAYS_HERE])
def test_time_split_over_devices_changes_nothing(way: Way, case: str) -> None:
    errors = found(way.name)["errors"][f"{way}, {case}"]
    assert {"y", "dv"} <= errors.keys()
    assert max(errors.values()) <= way.bound, errors


def test_the_halo_of_a_token_shift_comes_from_the_shard_before() -> None:
    assert found("chunked")["halo"]
