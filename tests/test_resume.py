"""A run that is stopped anywhere and started again ends with the bits of the run that was never stopped.

These runs are processes of their own, started as a user starts them: only a process can be killed.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.step import TrainState, make_trainer

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 300  # seconds; a process that has not done by then what is waited for has failed

# Lines of metrics.jsonl and checkpoints fall on the same steps, so that a resumed run writes the very same lines.
CONFIG = """
from rwkv_jax.config import *

def config():
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=TrainingConfig(num_steps=16, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=4, batches=2, sample_tokens=8, sample_prompts=("def", "x")),
        checkpoint=CheckpointConfig(every=2, keep=2),
        logging=LoggingConfig(every=2),
    )
"""


class Workplace:
    """A corpus and a config file, and the runs started from them."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.config = folder, folder / "config.py"
        source = folder / "source"
        source.mkdir()
        for i in range(24):
            lines = [f"def f{i}_{j}(x):\n    return x * {j} + {i * j}\n" for j in range(20)]
            (source / f"{i}.py").write_text("\n".join(lines))
        self.config.write_text(CONFIG.format(source=str(source), cache=str(folder / "cache")))
        # A restarted run loads the programs that the first one, or another module's, compiled.
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        return ["python", "train.py", str(self.config), "--run-dir", str(run_dir), *overrides]

    def start(self, command: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
        """Its output is appended to a file beside the run."""
        assert command[0] == "python"
        with run_dir.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command[1:]], cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log
            )

    def finish(self, command: list[str], run_dir: Path) -> str:
        """Runs to the end, which must be a good one; returns what this process printed."""
        before = len(read_log(run_dir))
        assert self.start(command, run_dir).wait(PATIENCE) == 0, read_log(run_dir)
        return read_log(run_dir)[before:]

    def final_state(self, run_dir: Path) -> TrainState:
        config = load_config(self.config)
        with ckpt.Checkpoints(run_dir, config.checkpoint.keep, pytest.fail) as checkpoints:
            state = checkpoints.restore(ckpt.abstract_state(make_trainer(config), config.seed))
        assert state is not None
        return state

    def assert_same_end(self, left: Path, right: Path) -> None:
        """Parameters, optimizer and counters bit for bit; every figure and sample; which step is the best."""
        states = [self.final_state(run_dir) for run_dir in (left, right)]
        for a, b in zip(*map(jax.tree.leaves, states), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert read_figures(left) == read_figures(right)
        for folder in ("checkpoints", "best"):
            assert steps_in(left / folder) == steps_in(right / folder)
            assert not [path.name for path in (right / folder).iterdir() if "tmp" in path.name]
        assert (right / "loss.png").stat().st_size > 0


def read_log(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text(errors="replace") if run_dir.with_suffix(".log").exists() else ""


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


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """Returns when a checkpoint of this step or a later one is there or being written."""
    deadline = time.monotonic() + PATIENCE
    while steps_in(run_dir / "checkpoints")[-1:] < [step]:
        assert process.poll() is None, f"the run ended before it could be stopped\n{read_log(run_dir)}"
        assert time.monotonic() < deadline, read_log(run_dir)
        time.sleep(0.002)


def kill(place: Workplace, command: list[str], run_dir: Path, target: int, draws: random.Random) -> None:
    """Starts the run and kills it at a random moment around the checkpoint of a step, or while it starts."""
    process = place.start(command, run_dir)
    try:
        if draws.random() < 0.2:
            time.sleep(draws.uniform(0, 4))
        else:
            wait_for_step(process, run_dir, target)
            # A save of so small a model takes some hundredths of a second.
            time.sleep(draws.uniform(0, 0.1))
        assert process.poll() is None, f"the run ended before it could be killed\n{read_log(run_dir)}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"), tmp_path_factory.getbasetemp() / "programs")


@pytest.fixture(scope="module")
def unbroken(place: Workplace) -> Path:
    """A run of 16 steps that nobody stopped."""
    run_dir = place.folder / "unbroken"
    place.finish(place.command(run_dir), run_dir)
    return run_dir


def test_unbroken_run_leaves_everything(unbroken: Path) -> None:
    figures = read_figures(unbroken)
    steps = {
        kind: [record["step"] for record in figures if record["kind"] == kind]
        for kind in ("train", "evaluation", "sample")
    }
    assert steps == {
        "train": [2, 4, 6, 8, 10, 12, 14, 16],
        "evaluation": [4, 8, 12, 16],
        "sample": [4, 8, 12, 16, 16],
    }
    assert all(record["skipped_steps"] == 0 for record in figures if record["kind"] == "train")
    losses = {record["step"]: record["loss"] for record in figures if record["kind"] == "evaluation"}
    assert steps_in(unbroken / "best") == [min(losses, key=losses.__getitem__)]
    assert steps_in(unbroken / "checkpoints") == [14, 16]


def test_three_kills_leave_no_trace(place: Workplace, unbroken: Path) -> None:
    run_dir, draws = place.folder / "killed", random.Random(3)
    for target in (2, 6, 12):
        kill(place, place.command(run_dir), run_dir, target, draws)
    place.finish(place.command(run_dir), run_dir)
    place.assert_same_end(unbroken, run_dir)


@pytest.mark.long
def test_twenty_kills_leave_no_trace(place: Workplace) -> None:
    steps = ("--training.num-steps", "200")
    unbroken, killed, draws = place.folder / "unbroken200", place.folder / "killed200", random.Random(20)
    place.finish(place.command(unbroken, *steps), unbroken)
    for number in range(20):
        kill(place, place.command(killed, *steps), killed, 8 * number + 2 * draws.randint(1, 4), draws)
    place.finish(place.command(killed, *steps), killed)
    place.assert_same_end(unbroken, killed)


def test_signals_save_and_print_the_command_that_goes_on(place: Workplace, unbroken: Path) -> None:
    run_dir = place.folder / "my signalled run"  # with blanks, so that the printed command has something to quote
    command = place.command(run_dir)
    for number, target in ((signal.SIGTERM, 2), (signal.SIGINT, 8)):
        before = len(read_log(run_dir))
        process = place.start(command, run_dir)
        wait_for_step(process, run_dir, target)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0, read_log(run_dir)
        found = re.search(rf"{number.name}: saved after step (\d+); resume with:  (.*)", read_log(run_dir)[before:])
        assert found is not None, read_log(run_dir)
        step, command = int(found[1]), shlex.split(found[2])
        assert steps_in(run_dir / "checkpoints")[-1] == step < 16
        assert not (run_dir / "loss.png").exists()
    printed = place.finish(command, run_dir)
    assert f"resuming after step {step}" in printed
    # A signal may have made the run save at an odd step, which is no step of the figures.
    assert [(r["kind"], r["step"]) for r in read_figures(run_dir)] == [
        (r["kind"], r["step"]) for r in read_figures(unbroken)
    ]
    for a, b in zip(*(jax.tree.leaves(place.final_state(path)) for path in (unbroken, run_dir)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
