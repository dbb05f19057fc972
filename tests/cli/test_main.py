"""How the `rwkv` command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.cli import doctor
from rwkv_jax.config import ConfigError
from tests.cli.commands import Command

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x = 3: too many"), "rwkv: x = 3: too many"),
        (OSError(28, "No space left on device"), "rwkv: [Errno 28] No space left on device"),
        (FloatingPointError("the logits are not finite"), "rwkv: the logits are not finite"),
        (KeyboardInterrupt(), 130),
    ],
    ids=str,
)
def test_errors_end_it_without_a_traceback(
    rwkv: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: object
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(doctor.Doctor, "run", fail)
    with pytest.raises(SystemExit) as exit_:
        rwkv("doctor")
    assert exit_.value.code == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "dance"),
        (["doctor", "--loud"], "--loud"),
        (["bench"], "Missing subcommand"),
        (["bench", "speed"], "speed"),
    ],
    ids=str,
)
def test_unknown_commands_and_flags_are_named(
    rwkv: Command, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_reader_that_has_had_enough_is_no_error() -> None:
    program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", program, "bench", "memory", "--random", "2x64", "--vocab-size", "50"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
