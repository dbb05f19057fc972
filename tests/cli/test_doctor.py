"""`rwkv doctor`: what it reports, and that it finds what is broken."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import pytest

from rwkv_jax import autotune
from rwkv_jax.cli import doctor
from rwkv_jax.cli.doctor import Check
from rwkv_kernels import OPERATORS, dispatch
from rwkv_kernels.autotune import BOUND, Trial, Tuning, workload_here
from tests.cli.commands import Command


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of measurements, which is not there yet."""
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def test_every_operator_is_right_here(rwkv: Command) -> None:
    printed = rwkv("doctor")
    assert printed.err == ""
    for name, operator in OPERATORS.items():
        for implementation, what in (("chunked", "prompts"), ("scan", "single tokens")):
            line = rf"^  {name}   {implementation:<16} {what:<14} relative error [\d.e-]+  good$"
            assert len(re.findall(line, printed.out, re.M)) == 1
        for implementation in operator.implementations:
            assert f"\n  {implementation:<16} " in printed.out
    assert f"\njax {jax.__version__}\n" in printed.out
    assert f"\nnumpy {numpy.__version__}\n" in printed.out
    assert f"\ndevice 0: {jax.devices()[0].platform} (" in printed.out
    assert printed.out.count("\n  single tokens    scan") == len(OPERATORS)


@pytest.mark.parametrize(("factor", "error"), [(1 + 1e-2, 1e-2), (jnp.nan, math.inf)])
def test_an_operator_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, factor: float, error: float) -> None:
    def broken(*inputs: Any, **options: Any) -> Any:
        y, state = whole.run(*inputs, **options)
        return factor * y, state

    whole = OPERATORS["wkv6"].implementations["chunked"]
    monkeypatch.setitem(
        OPERATORS["wkv6"].implementations,  # pyright: ignore[reportArgumentType]
        "chunked",
        dispatch.Implementation(broken, dispatch.anything),
    )
    failed = [check for check in doctor.check_operators() if not check.passes]
    assert [check[:3] for check in failed] == [("wkv6", "chunked", "prompts")]
    assert failed[0].error == pytest.approx(error, rel=1e-3)


def test_a_state_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any, **options: Any) -> Any:
        y, state = whole.run(*inputs, **options)
        return y, 2 * state

    whole = OPERATORS["wkv7"].implementations["chunked"]
    monkeypatch.setitem(
        OPERATORS["wkv7"].implementations,  # pyright: ignore[reportArgumentType]
        "chunked",
        dispatch.Implementation(broken, dispatch.anything),
    )
    failed = [check[:3] for check in doctor.check_operators() if not check.passes]
    assert failed == [("wkv7", "chunked", "prompts")]


def test_single_tokens_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any, **options: Any) -> Any:
        y, state = whole.run(*inputs, **options)
        # The definition, which is run in float64, stays.
        return (2 * y if y.shape[1] == 1 and y.dtype == jnp.float32 else y), state

    whole = OPERATORS["wkv5"].implementations["scan"]
    monkeypatch.setitem(
        OPERATORS["wkv5"].implementations,  # pyright: ignore[reportArgumentType]
        "scan",
        dispatch.Implementation(broken, dispatch.anything),
    )
    failed = [check[:3] for check in doctor.check_operators() if not check.passes]
    assert failed == [("wkv5", "scan", "single tokens")]


def test_what_has_been_measured_is_said(rwkv: Command, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(doctor, "check_operators", list)
    tuning = Tuning(workload_here("wkv6", (2, 32, 3, 16, 16)), (Trial("scan", 0.0, 2e-3, None),))
    autotune.keep(path, tuning)
    out = rwkv("doctor").out
    assert f"\nmeasured operators: 1 in {path}\n  wkv6 B2 T32 H3 N16 M16 float32 on " in out
    assert ", with gradients: scan, 2.000 ms\n" in out
    assert f"\n  {tuning.workload}: scan, as measured, in runs with --training.tune always\n" in out
    path.write_text("{}")
    out = rwkv("doctor").out
    assert f"\nmeasured operators: {path}: is no file of measurements of " in out
    assert "as measured" not in out


def test_what_was_measured_to_be_the_fastest_is_checked(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Once for all workloads with the same dtypes and sizes of a head, and not what cannot run here or is of others."""
    fastest = {"associative_scan": (2, 32, 3, 16, 16), "pallas_triton": (3, 32, 3, 16, 16), "gone": (4, 32, 3, 16, 16)}
    for name, shape in fastest.items():
        autotune.keep(path, Tuning(workload_here("wkv7", shape), (Trial(name, 0.0, 1.0, None),)))
    workload = workload_here("wkv7", (1, 512, 3, 16, 16))
    autotune.keep(path, Tuning(workload, (Trial("associative_scan", 0.0, 1.0, None),)))
    step = workload_here("wkv7_step", (4, 32, 3, 16, 16), gradients=False)
    autotune.keep(path, Tuning(step, (Trial("xla", 0.0, 1.0, None),)))
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "_kernels_digest", lambda: "another")
        other = workload_here("wkv7", (5, 32, 3, 16, 16))
        autotune.keep(path, Tuning(other, (Trial("chunked", 0.0, 1.0, None),)))
    checks = doctor._check_measured()
    assert [check[:3] for check in checks] == [
        ("wkv7", "associative_scan", "as measured"),
        ("wkv7_step", "xla", "as measured"),
    ]
    assert all(0 < check.error < BOUND for check in checks)

    def broken(*inputs: Any, **options: Any) -> Any:
        y, state = whole.run(*inputs, **options)
        return 1.001 * y, state

    whole = OPERATORS["wkv7"].implementations["associative_scan"]
    monkeypatch.setitem(
        OPERATORS["wkv7"].implementations,  # pyright: ignore[reportArgumentType]
        "associative_scan",
        dispatch.Implementation(broken, dispatch.anything),
    )
    assert [check.passes for check in doctor._check_measured()] == [False, True]


def test_what_was_measured_for_an_engine_is_said_where_it_is_taken(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    prefill = workload_here("wkv7", (1, 512, 12, 64, 64), gradients=False)
    autotune.keep(path, Tuning(prefill, (Trial("chunked", 0.0, 1.0, None),)))
    assert len(list(doctor.describe_engine())) == len(OPERATORS)  # on a CPU, which takes none
    measured = [Tuning(prefill, (Trial("chunked", 0.0, 1.0, None),))]
    monkeypatch.setattr(doctor, "_measured_here", lambda name: measured if name == "wkv7" else [])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    where = "for pieces of prompts of at least 512 tokens: not with a lower prefill_length"
    assert list(doctor.describe_engine())[-1] == f"  {prefill}: chunked, as measured, {where}"


def test_what_the_engine_takes_is_said_with_its_reason() -> None:
    lines = list(doctor.describe_engine())
    assert len(lines) == len(OPERATORS)
    for name, line in zip(OPERATORS, lines, strict=True):
        prompts = "scan" if name == "wkv7" else "chunked"
        assert line.startswith(f"  {name}   prompts: {prompts}, single tokens: scan; ")
        assert len(line.partition("; ")[2]) > 10


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Unable to initialize backend 'cuda':\n no driver"),
            "Unable to initialize backend 'cuda': no driver",
        ),
        (AssertionError(), "no platform that is asked for has one"),
    ],
    ids=["told", "asserted"],
)
def test_a_machine_without_devices_is_described(
    rwkv: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    def devices() -> Any:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    for arguments in (["bench", "memory", "--random", "2x64"], ["generate", "."], ["chat", "."], ["doctor"]):
        with pytest.raises(SystemExit, match=f"rwkv: JAX finds no device: {message}; mend the driver"):
            rwkv(*arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("platform: ")
    assert "\ndevices: none\n" in printed
    assert f"\njax {jax.__version__}\n" in printed
    assert "\ncompiled programs: " in printed
    assert "self-check" not in printed


def test_a_failed_check_is_the_exit_status(
    rwkv: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        Check("wkv4", "chunked", "prompts", BOUND / 2, BOUND),
        Check("wkv5", "chunked", "prompts", 2 * BOUND, BOUND),
        Check("wkv5", "scan", "single tokens", 2 * BOUND, BOUND),
    ]
    monkeypatch.setattr(doctor, "check_operators", lambda: checks)
    with pytest.raises(SystemExit, match="rwkv: wkv5: wrong on this machine"):
        rwkv("doctor")
    assert "WRONG: at most 1e-04" in capsys.readouterr().out
