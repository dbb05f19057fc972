"""A run may be stopped on one mesh and go on on another, with one process or several, and is the same run."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import (
    Machines,
    Workplace,
    end_all,
    kill_one,
    read_figures,
    read_log,
    steps_in,
    wait_for_all,
    wait_for_step,
)

# Each step's loss is written down; checkpoints, evaluations and samples fall on the steps of test_resume.py.
CONFIG = """
from rwkv_jax.config import *

def config():
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=StepConfig(num_steps=16, batch_size=8, sequence_length=32, carry_state=CARRY_STATE),
        evaluation=EvaluationConfig(every=4, batches=1, sample_tokens=8, sample_prompts=("def",)),
        checkpoint=CheckpointConfig(every=2, keep=2),
        logging=LoggingConfig(every=1),
    )
"""

ONE_DEVICE = Machines()
DATA_8 = Machines(("--parallel.data", "8"), devices=8)
DATA_4_TENSOR_2 = Machines(("--parallel.data", "4", "--parallel.tensor", "2"), devices=8)
FSDP_2_TENSOR_2 = Machines(("--parallel.fsdp", "2", "--parallel.tensor", "2"), devices=4)
TWO_PROCESSES = Machines(("--parallel.fsdp", "2"), devices=2, processes=2)

FEW = ("--checkpoint.every", "8", "--evaluation.every", "16", "--evaluation.sample-prompts")
"""Little but steps, and no samples, for runs whose losses alone are looked at."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    programs = tmp_path_factory.getbasetemp() / "programs"
    return Workplace(tmp_path_factory.mktemp("meshes"), programs, CONFIG.replace("CARRY_STATE", "True"))


@pytest.fixture(scope="module")
def unbroken(place: Workplace) -> Callable[..., Path]:
    """The run that nobody stopped, of some length on some machines."""
    made: dict[tuple[object, ...], Path] = {}

    def run(machines: Machines, *overrides: str) -> Path:
        run_dir = made.setdefault((machines, overrides), place.folder / f"unbroken{len(made)}")
        if not run_dir.exists():
            place.finish_on(machines, run_dir, *overrides)
        return run_dir

    return run


def losses_of(run_dir: Path) -> list[float]:
    """Of each step."""
    return [record["loss"] for record in read_figures(run_dir) if record["kind"] == "train"]


def goes_on(place: Workplace, before: Path, machines: Machines, run_dir: Path) -> None:
    """Lets a copy of a run go on after step 8, and holds its losses against those of the run itself."""
    shutil.copytree(before, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "16")
    shutil.rmtree(run_dir / "best")
    place.finish_on(machines, run_dir, *FEW)
    assert "resuming after step 8" in read_log(run_dir)
    expected, found = losses_of(before), losses_of(run_dir)
    assert len(found) == 16
    assert found[:8] == expected[:8]
    assert found[8] == pytest.approx(expected[8], rel=1e-6)
    # What rounding does to Adam's steps; another order of the rows would make a difference of more than 1e-2.
    assert found[9:] == pytest.approx(expected[9:], rel=1e-4)


@pytest.mark.parametrize(
    "machines",
    [
        pytest.param(TWO_PROCESSES, marks=pytest.mark.long),
        pytest.param(DATA_4_TENSOR_2, marks=pytest.mark.long),
        pytest.param(ONE_DEVICE, marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    place: Workplace, unbroken: Callable[..., Path], machines: Machines, tmp_path: Path
) -> None:
    goes_on(place, unbroken(DATA_8, *FEW), machines, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("machines", [DATA_4_TENSOR_2, ONE_DEVICE, TWO_PROCESSES])
def test_a_run_that_carries_no_state_goes_on_on_another_mesh(
    tmp_path_factory: pytest.TempPathFactory, machines: Machines, tmp_path: Path
) -> None:
    programs = tmp_path_factory.getbasetemp() / "programs"
    place = Workplace(tmp_path, programs, CONFIG.replace("CARRY_STATE", "False"))
    before = tmp_path / "before"
    place.finish_on(DATA_8, before, *FEW)
    goes_on(place, before, machines, tmp_path / "after")


def kill_and_restart(place: Workplace, machines: Machines, run_dir: Path, kills: int, *overrides: str) -> None:
    """Kills one process of a run time and again, each time at another step, then lets the run come to its end."""
    draws = random.Random(kills)
    for number in range(kills):
        processes = place.start_on(machines, run_dir, *overrides)
        kill_one(processes, draws.randrange(machines.processes), run_dir, 8 * number + 2 * draws.randint(1, 4), draws)
    place.finish_on(machines, run_dir, *overrides)


@pytest.mark.long
@pytest.mark.parametrize("machines", [FSDP_2_TENSOR_2, TWO_PROCESSES])
def test_twenty_kills_of_one_process_leave_no_trace(
    place: Workplace, unbroken: Callable[..., Path], machines: Machines, tmp_path: Path
) -> None:
    steps = ("--training.num-steps", "200")
    kill_and_restart(place, machines, tmp_path / "killed", 20, *steps)
    place.assert_same_end(unbroken(machines, *steps), tmp_path / "killed")


@pytest.mark.long
def test_two_kills_of_one_of_two_processes_leave_no_trace(
    place: Workplace, unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    steps = ("--training.num-steps", "24")
    kill_and_restart(place, TWO_PROCESSES, tmp_path / "killed", 2, *steps)
    place.assert_same_end(unbroken(TWO_PROCESSES, *steps), tmp_path / "killed")


@pytest.mark.long
@pytest.mark.parametrize("signaled", [0, 1])
def test_a_signal_to_one_of_two_processes_saves_in_both(
    place: Workplace, unbroken: Callable[..., Path], tmp_path: Path, signaled: int
) -> None:
    run_dir = tmp_path / "run"
    processes = place.start_on(TWO_PROCESSES, run_dir)
    try:
        wait_for_step(processes, run_dir, 4)
        processes[signaled].send_signal(signal.SIGTERM)
    except BaseException:
        end_all(processes)
        raise
    wait_for_all(processes, run_dir, status=0)
    found = re.search(
        r"SIGTERM: saved after step (\d+); resume with:  python train.py .*--distributed", read_log(run_dir)
    )
    assert found is not None, read_log(run_dir)
    assert steps_in(run_dir / "checkpoints")[-1] == int(found[1]) < 16
    place.finish_on(TWO_PROCESSES, run_dir)
    assert f"resuming after step {found[1]}" in read_log(run_dir)
    assert losses_of(run_dir) == losses_of(unbroken(TWO_PROCESSES))


@pytest.mark.long
def test_a_share_of_a_checkpoint_that_is_damaged_for_one_process_is_damaged_for_all(
    place: Workplace, unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    before = unbroken(TWO_PROCESSES)
    run_dir = tmp_path / "run"
    shutil.copytree(before, run_dir)
    damaged = run_dir / "checkpoints" / "16"
    files = [path for path in damaged.rglob("d/*") if "ocdbt.process_1" in str(path)]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    place.finish_on(TWO_PROCESSES, run_dir)
    assert "checkpoint of step 16 is damaged" in read_log(run_dir)
    assert "resuming after step 14" in read_log(run_dir)
    (aside,) = (run_dir / "checkpoints").glob("damaged-16-*")
    shutil.rmtree(aside)
    place.assert_same_end(before, run_dir)


@pytest.mark.long
def test_a_process_that_lags_is_waited_for(place: Workplace, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    processes = place.start_on(TWO_PROCESSES, run_dir)
    try:
        for lagging, step in enumerate((2, 6, 10)):
            wait_for_step(processes, run_dir, step)
            processes[lagging % 2].send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            processes[lagging % 2].send_signal(signal.SIGCONT)
    except BaseException:
        end_all(processes)
        raise
    wait_for_all(processes, run_dir, status=0)
    place.assert_same_end(unbroken(TWO_PROCESSES), run_dir)


def test_two_processes_save_while_they_train_and_one_process_reads_it(place: Workplace, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # By the definition, which compiles faster than `chunked`.
    few = ("--training.num-steps", "4", "--evaluation.every", "4", "--evaluation.sample-prompts")
    few += ("--model.wkv-implementation", "scan")
    place.finish_on(TWO_PROCESSES, run_dir, *few)
    assert steps_in(run_dir / "checkpoints") == [2, 4]
    assert len(losses_of(run_dir)) == 4
    assert place.final_state(run_dir).step == 4  # restored, so every digest was right


def test_processes_that_read_different_corpora_all_stop(place: Workplace, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(place.folder / "source", folder / "texts")
    (folders[1] / "texts" / "3.py").write_text("def another():\n    return 0\n")
    own = [("--data.cache-dir", str(folder / "cache")) for folder in folders]
    processes = place.start_on(TWO_PROCESSES, run_dir, "--data.source", "texts", own=own, folders=folders)
    wait_for_all(processes, run_dir, status=1)
    for index in range(2):
        assert f"process {index} of 2: the processes were started with different corpus" in read_log(run_dir, index)
        assert re.search(r"^  corpus +[0-9a-f]+ +0\n  corpus +[0-9a-f]+ +1$", read_log(run_dir, index), re.MULTILINE)
    assert not list(run_dir.iterdir())


@pytest.mark.long
def test_processes_with_different_settings_all_stop(place: Workplace, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    processes = place.start_on(TWO_PROCESSES, run_dir, own=[("--seed", "0"), ("--seed", "1")])
    wait_for_all(processes, run_dir, status=1)
    for index in range(2):
        assert re.search(r"^  seed +0 +0\n  seed +1 +1$", read_log(run_dir, index), re.MULTILINE)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--parallel.data", "3"), r"parallel: data 3, .* take a multiple of 3 devices, but there are 8"),
        (
            ("--parallel.data", "8", "--training.batch-size", "12"),
            r"training\.batch_size: 12 rows .* data 8 x fsdp 1 = 8 devices; the nearest sizes are 8 or 16",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_any_work(
    place: Workplace, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    run_dir = tmp_path / "run"
    wait_for_all(place.start_on(Machines(flags, devices=8), run_dir), run_dir, status=1)
    assert re.search(message, read_log(run_dir)), read_log(run_dir)
    assert not list(run_dir.iterdir())
