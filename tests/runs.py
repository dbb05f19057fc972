"""Runs as a user starts them, in processes of their own: only a process can be killed, and has devices of its own."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.functions import abstract_state, make_train_functions
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.state import TrainState
from tests.golden import QUICK_FLAGS
from tests.parallel.process_pair import free_port
from tests.small_runs import assert_same_bits, write_corpus
from tests.training.saved import restore

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 300  # seconds; a process that has not done by then what is waited for has failed

IMPATIENT = ("--distributed.join-seconds", "40", "--distributed.heartbeat-seconds", "4")
"""For processes that notice soon that another is lost."""


@dataclasses.dataclass(frozen=True)
class Machines:
    """What a run is started on."""

    flags: tuple[str, ...] = ()
    """How `train.py` is told to split the run."""
    devices: int = 1
    """Fake devices of each process."""
    processes: int = 1


class Workplace:
    """A corpus and a config file, and the runs started from them."""

    def __init__(self, folder: Path, programs: Path, config: str, *, as_users: bool = False) -> None:
        """Makes the corpus and writes the config.

        Args:
          config: the file's text, in which {source!r} and {cache!r} stand for the folders of the corpus.
          as_users: whether programs are compiled as users do.
        """
        self.folder, self.config = folder, folder / "config.py"
        source = write_corpus(folder / "source")
        self.config.write_text(config.format(source=str(source), cache=str(folder / "cache")))
        # A restarted run loads the programs that the first one, or another module's, compiled.
        self.environment = (
            os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": str(programs),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            | ({"XLA_FLAGS": ""} if as_users else {})
        )

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        return ["python", "train.py", str(self.config), "--run-dir", str(run_dir), *overrides]

    def start(
        self, command: list[str], run_dir: Path, *, index: int = 0, flags: Sequence[str] = (), folder: Path = REPOSITORY
    ) -> subprocess.Popen[bytes]:
        """Its output is appended to a file beside the run; each process of a run has one.

        Args:
          index: of the process in its run.
          flags: for XLA.
          folder: where the process runs.
        """
        assert command[0] == "python"
        environment = self.environment | ({"XLA_FLAGS": " ".join(flags)} if flags else {})
        with log_file(run_dir, index).open("ab") as log:
            command = [sys.executable, *command[1:]]
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def finish(self, command: list[str], run_dir: Path, *, patience: float = PATIENCE) -> str:
        """Runs to the end, which must be a good one; returns what this process printed."""
        before = len(read_log(run_dir))
        assert self.start(command, run_dir).wait(patience) == 0, read_log(run_dir)
        return read_log(run_dir)[before:]

    def start_on(
        self,
        machines: Machines,
        run_dir: Path,
        *overrides: str,
        own: Sequence[Sequence[str]] = (),
        folders: Sequence[Path] = (),
    ) -> list[subprocess.Popen[bytes]]:
        """All processes of a run.

        Args:
          own: what each process is told besides.
          folders: where each process runs.
        """
        port = free_port()
        started = []
        for index in range(machines.processes):
            flags = [*machines.flags, *overrides, *(own[index] if own else ())]
            if machines.processes > 1:
                flags += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.process-id", str(index)]
                flags += ["--distributed.num-processes", str(machines.processes), *IMPATIENT]
            fake = f"--xla_force_host_platform_device_count={machines.devices}"
            command = self.command(run_dir, *flags)
            folder = folders[index] if folders else REPOSITORY
            if folders:
                command[1] = str(REPOSITORY / command[1])
            started.append(self.start(command, run_dir, index=index, flags=[*QUICK_FLAGS, fake], folder=folder))
        return started

    def finish_on(self, machines: Machines, run_dir: Path, *overrides: str) -> None:
        """Runs to the end, which must be a good one in every process."""
        wait_for_all(self.start_on(machines, run_dir, *overrides), run_dir, status=0)

    def final_state(self, run_dir: Path) -> TrainState:
        """The newest checkpoint, read on one device."""
        config = load_config(self.config)
        with ckpt.Checkpoints(run_dir, config.checkpoint.keep, pytest.fail) as checkpoints:
            functions = make_train_functions(config)
            return restore(checkpoints, functions.kept(abstract_state(functions)))

    def assert_same_end(self, left: Path, right: Path) -> None:
        """Parameters, optimizer and counters bit for bit; every figure and sample; which step is the best."""
        assert_same_bits(self.final_state(left), self.final_state(right))
        assert read_figures(left) == read_figures(right)
        for folder in ("checkpoints", "best"):
            assert steps_in(left / folder) == steps_in(right / folder)
            assert not [path.name for path in (right / folder).iterdir() if "tmp" in path.name]
            assert not [path.name for path in (right / folder).iterdir() if "damaged" in path.name]
        assert (right / "loss.png").stat().st_size > 0


def log_file(run_dir: Path, index: int = 0) -> Path:
    """What a process of a run prints."""
    return run_dir.with_suffix(f".{index}.log" if index else ".log")


def read_log(run_dir: Path, index: int = 0) -> str:
    path = log_file(run_dir, index)
    return path.read_text(errors="replace") if path.exists() else ""


def read_figures(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the one figure that depends on the clock."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, those that are being written included."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({int(found[0]) for name in names if (found := re.match(r"\d+", name))})


def wait_for_step(processes: Sequence[subprocess.Popen[bytes]], run_dir: Path, step: int) -> None:
    """Returns when a checkpoint of this step or a later one is there or being written."""
    deadline = time.monotonic() + PATIENCE
    while steps_in(run_dir / "checkpoints")[-1:] < [step]:
        alive = all(process.poll() is None for process in processes)
        assert alive, f"the run ended before it could be stopped\n{read_log(run_dir)}{read_log(run_dir, 1)}"
        assert time.monotonic() < deadline, read_log(run_dir)
        time.sleep(0.002)


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]], run_dir: Path, status: int) -> None:
    """Waits until all processes of a run have ended with this status."""
    try:
        for index, process in enumerate(processes):
            assert process.wait(PATIENCE) == status, read_log(run_dir, index)
    finally:
        end_all(processes)


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills what is left of a run."""
    for process in processes:
        process.kill()
        process.wait()


def kill_one(
    processes: Sequence[subprocess.Popen[bytes]],
    victim: int,
    run_dir: Path,
    target: int,
    draws: random.Random,
    *,
    longest_start: float = 4,
) -> None:
    """Kills one process of a run at a random moment around the checkpoint of a step, or while it starts; the others
    must end by themselves, and not well.

    Args:
      longest_start: seconds within which a kill at the start falls.
    """
    try:
        if draws.random() < 0.2:
            time.sleep(draws.uniform(0, longest_start))
        else:
            wait_for_step(processes, run_dir, target)
            # A save of so small a model takes some hundredths of a second.
            time.sleep(draws.uniform(0, 0.1))
        assert processes[victim].poll() is None, f"the run ended before it could be killed\n{read_log(run_dir)}"
        processes[victim].kill()
        for index, process in enumerate(processes):
            assert process.wait(PATIENCE) != 0, read_log(run_dir, index)
    finally:
        end_all(processes)
