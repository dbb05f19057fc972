"""A wall clock that is set while a run goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rwkv_jax.training.reporting.throughput import Throughput
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, restore, run, steps_of

YEAR = 365 * 24 * 3600


@pytest.mark.long
@pytest.mark.parametrize("years", [30, -20])
def test_a_clock_that_is_set_by_years_changes_nothing(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    seconds, nanoseconds, step = time.time, time.time_ns, Throughput.step
    steps = 0

    def jumped() -> int:
        return years * YEAR if steps >= 2 else 0  # before the first checkpoint, whose times Orbax takes by this clock

    def count(throughput: Throughput) -> None:
        nonlocal steps
        steps += 1
        step(throughput)

    monkeypatch.setattr(time, "time", lambda: seconds() + jumped())
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + jumped() * 10**9)
    monkeypatch.setattr(Throughput, "step", count)
    jumps = run(finished.config, tmp_path / "run")
    assert steps == 8
    assert_same_bits(restore(jumps.config, jumps.folder), finished.result.state)
    assert steps_of(jumps.folder, "train") == steps_of(finished.folder, "train")
