"""Rows and heads split over devices by `shard_map`: the same values and gradients as on one device."""

from __future__ import annotations

import functools
from typing import Any

from tests.fake_devices import run_on_fake_devices
from tests.kernels.operators import Way, each_way


def run_on_four_devices(program: str) -> Any:
    """What a program prints as JSON, in a process with four fake devices."""
    return run_on_fake_devices(4, program)


@functools.cache
def errors_on_four_devices() -> dict[str, dict[str, float]]:
    """Of every way, from one process."""
    return run_on_four_devices("tests.kernels.sharded")


@each_way
def test_rows_and_heads_split_over_devices_change_nothing(way: Way) -> None:
    errors = errors_on_four_devices()[str(way)]
    assert {"y", "dv"} <= errors.keys()
    assert max(errors.values()) <= way.bound, errors
