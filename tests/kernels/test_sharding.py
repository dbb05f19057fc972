"""Rows and heads split over devices by `shard_map`: the same values and gradients as on one device."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kernels.operators import Way, each_way

ROOT = Path(__file__).parents[2]


def run_on_four_devices(program: str) -> Any:
    """What a program of this folder prints as JSON, in a process with four fake devices."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@functools.cache
def errors_on_four_devices() -> dict[str, dict[str, float]]:
    """Of every way, from one process."""
    return run_on_four_devices("tests.kernels.sharded")


@each_way
def test_rows_and_heads_split_over_devices_change_nothing(way: Way) -> None:
    errors = errors_on_four_devices()[str(way)]
    assert {"y", "dv"} <= errors.keys()
    assert max(errors.values()) <= way.bound, errors
