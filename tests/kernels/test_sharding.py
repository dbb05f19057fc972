"""Rows and heads split over devices by `shard_map`: the same values and gradients as on one device."""

from __future__ import annotations

import functools
from typing import Any

from tests.fake_devices import run_on_fake_devices
from tests.kernels.operators import WAYS, Way, each_way_but_briefly


def run_on_four_devices(program: str, *ways: str) -> Any:
    """What a program prints as JSON about the ways named, in a process with four fake devices."""
    return run_on_fake_devices(4, program, *ways)


BRIEF = ("chunked", "wkv7-scan", "wkv7-pallas_triton")


@functools.cache
def errors_on_four_devices(*, brief: bool) -> dict[str, dict[str, float]]:
    """Of the ways that always run, or of all others, from one process."""
    ways = [str(way) for way in WAYS if (way.name in BRIEF or str(way) in BRIEF) == brief]
    return run_on_four_devices("tests.kernels.sharded", *ways)


@each_way_but_briefly(*BRIEF)
def test_rows_and_heads_split_over_devices_change_nothing(way: Way) -> None:
    errors = errors_on_four_devices(brief=way.name in BRIEF or str(way) in BRIEF)[str(way)]
    assert {"y", "dv"} <= errors.keys()
    assert max(errors.values()) <= way.bound, errors
