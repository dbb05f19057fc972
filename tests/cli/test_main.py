"""How the `rwkv` command ends."""

from __future__ import annotations

import importlib.abc
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_jax
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
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes."),
            "rwkv: memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.); hold the model in "
            "fewer bits with --quantize int8 or int4, ask for fewer texts at once, end other programs that use the "
            "device, or take a smaller model",
        ),
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


def test_an_error_that_nobody_foresaw_keeps_its_traceback(rwkv: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(doctor.Doctor, "run", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        rwkv("doctor")


def test_an_interrupt_while_commands_are_imported_is_quiet(rwkv: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *others: object) -> None:
            if name == "rwkv_jax.cli.command":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rwkv_jax.cli.command", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as exit_:
        rwkv("--help")
    assert exit_.value.code == 130


def test_version(rwkv: Command) -> None:
    assert rwkv("--version").out == f"rwkv-jax {rwkv_jax.__version__}\n"


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_jax", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rwkv-jax {rwkv_jax.__version__}\n", "")


def test_help_says_what_the_command_is_for(rwkv: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("--help")
    assert exit_.value.code == 0
    assert "\nTrain RWKV language models, generate text and chat with them, " in capsys.readouterr().out


@pytest.mark.parametrize("command", [["train.py", "--help"], ["-m", "rwkv_jax", "--version"]])
def test_a_reader_that_goes_away_ends_it_quietly(command: list[str]) -> None:
    """As `python train.py --help | head` does; the reader has gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b""


def test_what_the_terminal_cannot_show_is_replaced(rwkv: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(doctor.Doctor, "run", lambda self: print("é日", flush=True))
    rwkv("doctor")
    assert written.getvalue() == b"??\n"


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
def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", program, "bench", "memory", "--random", "2x64", "--vocab-size", "50"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
