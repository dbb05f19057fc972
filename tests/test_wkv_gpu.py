"""benchmarks/wkv_gpu.py: it runs without a GPU and says so, keeps to its budget, and names what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

import gpu_operators
import wkv_gpu
from gpu_items import NO_TIME, NOT_COMPILED, Item, run_items, skipping
from gpu_operators import SMALL_SHAPES, Settings
from rwkv_kernels import OPERATORS, PARTS, dispatch

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="what it does without a GPU is the question")

SETTINGS = Settings(("wkv7", "wkv6"), SMALL_SHAPES, ("bfloat16",), 1, on_gpu=False)


def run(*arguments: object) -> int:
    return wkv_gpu.main([str(x) for x in arguments])


def records(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "wkv_gpu.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["bytes_a_second"] > 0
    return found["records"]


def test_without_time_everything_is_named_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", tmp_path / "new", "--budget", 0) == 0
    assert "no GPU here: kernels are skipped" in capsys.readouterr().out
    found = records(tmp_path / "new")
    assert {record["part"] for record in found} == set(wkv_gpu.PARTS)
    assert all(record["skipped"] for record in found)
    named = {record["name"].partition(" N")[0] for record in found if record["part"] == "correctness"}
    assert named == {
        f"{operator} {name}"
        for operator, known in (OPERATORS | PARTS).items()
        for name in known.implementations
        if name.startswith("pallas") or name in ("chunked", "xla")
    }


def test_what_is_right_and_what_cannot_run_here_is_said(tmp_path: Path) -> None:
    assert run("--out", tmp_path, "--parts", "correctness", "--operators", *PARTS) == 0
    found = {record["name"]: record for record in records(tmp_path)}
    assert found["wkv7_step pallas_triton"]["skipped"] == "it needs an NVIDIA GPU, and this is cpu"
    checked = {name: record for name, record in found.items() if "right" in record}
    assert {name.split()[0] for name in checked} == set(PARTS)
    assert all(record["right"] and 0 < record["error"] <= record["bound"] for record in checked.values())


def test_a_kernel_that_is_wrong_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = PARTS["wkv7_step"].implementations["xla"]

    def wrong(*inputs: Any, **options: Any) -> Any:
        o, state = whole.run(*inputs, **options)
        return 1.1 * o, state

    def fails(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no lowering")

    for part, run_it in (("wkv7_step", wrong), ("wkv7_output", fails)):
        kernel = dispatch.Implementation(run_it, dispatch.anything)
        monkeypatch.setitem(PARTS[part].implementations, "pallas_triton", kernel)  # pyright: ignore[reportArgumentType]
    assert run("--out", tmp_path, "--parts", "correctness", "--operators", *PARTS) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WRONG, or failing: wkv7_step pallas_triton N8 bfloat16 forward; ")
    assert last.endswith("; wkv7_output pallas_triton N8 bfloat16 gradients")


def test_on_a_gpu_every_kernel_has_to_be_checked() -> None:
    def wait() -> Any:
        goes_on.wait()
        return dict

    goes_on = threading.Event()
    try:
        items = [
            dataclasses.replace(item(name, wait), part=part) for part, name in (("correctness", "a"), ("times", "b"))
        ]
        refused = skipping("correctness", "c", "it needs a TPU")
        records = [*run_items([*items, refused], 0.2, threads=3), *run_items(items, 0)]
    finally:
        goes_on.set()
    assert [record.get("skipped") for record in records] == [*[NOT_COMPILED] * 2, "it needs a TPU", *[NO_TIME] * 2]
    assert wkv_gpu.complaints(records, on_gpu=False) == []
    (complaint,) = wkv_gpu.complaints(records, on_gpu=True)
    assert complaint == "NOT CHECKED, for want of time; give a larger --budget: a; a"


def test_each_precision_of_a_kernel_is_checked_on_the_operators_own_grounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that can run here, of which nothing is compiled."""
    implementations = OPERATORS["wkv6"].implementations
    kernel = dataclasses.replace(implementations["pallas_triton"], refuses=dispatch.anything)
    monkeypatch.setitem(implementations, "pallas_triton", kernel)  # pyright: ignore[reportArgumentType]
    names = [item.name for item in gpu_operators.correctness(SETTINGS) if item.name.startswith("wkv6 pallas_triton N")]
    assert names == [
        "wkv6 pallas_triton N8 float32 gradients, packed full",
        "wkv6 pallas_triton N8 float32 gradients, packed default",
        "wkv6 pallas_triton N8 float32 gradients, packed fast",
        "wkv6 pallas_triton N8 bfloat16 gradients full",
        "wkv6 pallas_triton N8 bfloat16 forward full",
    ]
    seen: list[Any] = []
    spy = dispatch.Implementation(lambda *_, **options: seen.append(options), dispatch.anything)
    gpu_operators.with_precision(spy, "fast").run(precision="full", segments=None)
    assert seen == [{"precision": "fast", "segments": None}]


def test_operators_are_timed_with_errors_at_that_size(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--parts", "operators", "--operators", "wkv7", "--repetitions", 1)
    assert run(*arguments, "--dtypes", "float32") == 0
    timed, *others = records(tmp_path)
    assert timed["name"] == "wkv7 chunked 1x64x2x16x16 float32"
    assert min(timed["forward_ms"], timed["both_ms"], timed["over_the_roofline"]) > 0
    assert 0 < timed["error_y"] < 1e-5
    assert 0 < timed["worst_error"] < 1e-4
    assert others[-1]["skipped"] == "it needs a GPU"
    assert all("skipped" in record for record in others)


@pytest.mark.long
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    assert run("--out", tmp_path, "--repetitions", 1) == 0
    found = records(tmp_path)
    assert not [record for record in found if "failed" in record]
    measured = {record["name"] for record in found if "skipped" not in record}
    assert {"0.1B chunked", "1.5B, 1 texts, step_implementation None", "wkv7_step, 2 rows"} <= measured


# The budget


def item(name: str, prepare: Any) -> Item:
    return Item("part", name, prepare)


def test_what_fails_does_not_keep_others_from_running() -> None:
    def fails() -> Any:
        raise ValueError("no lowering\nfor this device")

    order: list[str] = []

    def runs(name: str) -> Any:
        order.append(name)
        return {"ms": 1.0}

    found = run_items(
        [item("compiler", fails), item("device", lambda: fails), item("good", lambda: functools.partial(runs, "good"))],
        60,
    )
    failure = "ValueError: no lowering"
    assert list(found) == [
        {"part": "part", "name": "compiler", "failed": failure},
        {"part": "part", "name": "device", "failed": failure},
        {"part": "part", "name": "good", "ms": 1.0},
    ]
    assert order == ["good"]


def test_what_is_not_compiled_in_time_is_given_up_and_the_rest_runs() -> None:
    goes_on = threading.Event()
    try:
        slow, waits, quick = run_items(
            [item("slow", goes_on.wait), item("waits", lambda: dict), item("quick", lambda: dict)], 0.3, threads=1
        )
        assert {record["skipped"] for record in (slow, waits, quick)} == {"it was not compiled in time"}
        slow, quick = run_items([item("slow", goes_on.wait), item("quick", lambda: dict)], 0.5, threads=2)
        assert slow["skipped"] == "it was not compiled in time"
        assert quick == {"part": "part", "name": "quick", "compiled_beside": 1}
    finally:
        goes_on.set()
