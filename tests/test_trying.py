"""Marks of kernels that are being tried: one that takes its process with it is named, and left out until asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import autotune
from rwkv_jax.trying import forget, left_since, marked
from rwkv_kernels.autotune import Trial, Tuning, Workload, workload_here

DYING = "import os, pathlib, sys, rwkv_jax.trying as t\nwith t.marked(pathlib.Path(sys.argv[1])): os._exit(1)"
WORKLOAD = workload_here("wkv7", (1, 3, 1, 4, 4), gradients=False)


def die_trying(mark: Path) -> None:
    assert subprocess.run([sys.executable, "-c", DYING, str(mark)], check=False).returncode == 1


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "marks" / "wkv7 by pallas_triton"


def test_a_process_that_dies_leaves_its_mark(mark: Path) -> None:
    assert left_since(mark) is None
    die_trying(mark)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", left_since(mark) or "")
    assert left_since(mark) is not None  # looking changes nothing
    forget(mark)
    assert left_since(mark) is None
    assert not mark.exists()


def test_what_ends_leaves_none(mark: Path) -> None:
    with marked(mark):
        assert mark.exists()
        assert left_since(mark) is None  # its process lives
        forget(mark)
        assert mark.exists()
        with marked(mark):  # another one that tries the same
            pass
        assert mark.exists()
    assert not mark.parent.exists()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), marked(mark):
            raise error
        assert not mark.exists()


def test_where_no_mark_can_be_left_it_is_tried_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "marks").write_text("")
    with marked(tmp_path / "marks" / "x"):
        pass
    assert left_since(tmp_path / "marks" / "x") is None


def test_what_did_not_come_back_is_named_and_left_out_until_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, kernel = tmp_path / "tuning.json", "pallas_triton"
    marks: dict[str, set[str]] = {}

    def tune(workload: Workload, *, left_out: dict[str, str], trying: Any, **_: Any) -> Tuning:
        for name in {"chunked", kernel} - left_out.keys():
            with trying(name):
                marks[name] = {mark.name.partition(",")[0] for mark in tmp_path.glob("*/wkv7*")}
        return Tuning(workload, tuple(Trial(name, None, None, reason) for name, reason in left_out.items()))

    monkeypatch.setattr(autotune.autotune, "tune", tune)
    assert autotune.measure(WORKLOAD, path).trials == ()
    assert marks == {"chunked": set(), kernel: {f"wkv7 by {kernel}"}}
    die_trying(autotune._mark(path, WORKLOAD, kernel))
    for workload in (WORKLOAD, workload_here("wkv7", (2, 3, 1, 8, 8))):  # whatever its sizes
        (trial,) = autotune.measure(workload, path).trials
        failure = r"not tried: it did not come back from a trial that began [-\d]+ [:\d]+; rwkv tune --again tries it"
        assert (trial.name, bool(re.fullmatch(failure, trial.failure or ""))) == (kernel, True)
    line = autotune.describe(path)[-1]
    assert line.startswith(f"  wkv7 by {kernel}: did not come back from a trial that began ")
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "_kernels_digest", lambda: "another")
        assert autotune.measure(WORKLOAD, path).trials == ()  # another version's may come back
    assert autotune.measure(WORKLOAD, path, again=True).trials == autotune.measure(WORKLOAD, path).trials == ()


def test_what_the_table_takes_is_tried_whatever_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    monkeypatch.setattr(autotune.autotune, "tune", lambda workload, *, left_out, **_: left_out)
    for name in ("chunked", "scan", "associative_scan"):
        die_trying(autotune._mark(path, WORKLOAD, name))
    assert list(autotune.measure(WORKLOAD, path)) == ["associative_scan"]  # pyright: ignore[reportArgumentType]
