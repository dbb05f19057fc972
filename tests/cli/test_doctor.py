"""`rwkv doctor`: what it reports, and that it finds what is broken."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import pytest

from rwkv_jax.cli import doctor
from rwkv_jax.cli.doctor import BOUND, Check
from rwkv_kernels import OPERATORS, dispatch
from tests.cli.commands import Command


def test_every_operator_is_right_here(rwkv: Command) -> None:
    printed = rwkv("doctor")
    assert printed.err == ""
    for name, operator in OPERATORS.items():
        assert len(re.findall(rf"^  {name}   {'chunked':<16} relative error [\d.e-]+  good$", printed.out, re.M)) == 1
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
    for check in doctor.check_operators():
        assert check.passes == (check.operator != "wkv6")
        if check.operator == "wkv6":
            assert check.error == pytest.approx(error, rel=1e-3)


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
    assert [check.operator for check in doctor.check_operators() if not check.passes] == ["wkv7"]


def test_a_failed_check_is_the_exit_status(
    rwkv: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("wkv4", "chunked", BOUND / 2), Check("wkv5", "chunked", 2 * BOUND)]
    monkeypatch.setattr(doctor, "check_operators", lambda: checks)
    with pytest.raises(SystemExit, match="rwkv: wkv5: wrong on this machine"):
        rwkv("doctor")
    assert "WRONG: at most 1e-04" in capsys.readouterr().out
