"""A run that is stopped anywhere and started again ends with the bits of the run that was never stopped."""

from __future__ import annotations

import random
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.runs import PATIENCE, Workplace, kill_one, log_file, read_figures, read_log, steps_in, wait_for_step
from tests.small_runs import assert_same_bits

# Lines of metrics.jsonl and checkpoints fall on the same steps, so that a resumed run writes the very same lines.
CONFIG = """
from rwkv_jax.config import *

def config():
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=StepConfig(num_steps=16, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=4, batches=2, sample_tokens=8, sample_prompts=("def", "x")),
        checkpoint=CheckpointConfig(every=2, keep=2),
        logging=LoggingConfig(every=2),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"), tmp_path_factory.getbasetemp() / "programs", CONFIG)


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


def test_a_kill_leaves_no_trace(place: Workplace, unbroken: Path) -> None:
    run_dir = place.folder / "killed"
    kill_one([place.start(place.command(run_dir), run_dir)], 0, run_dir, 6, random.Random(3))
    place.finish(place.command(run_dir), run_dir)
    place.assert_same_end(unbroken, run_dir)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fields", "changes", "said"),
    [
        (
            "initial_weights={base!r}, tuning=TuningConfig('lora', rank=4, dropout=0.2, also=('ln',))",
            {},
            "trained: lora of rank 4, ln",
        ),
        (
            "distillation=DistillationConfig({base!r}, temperature=2.0, top_k=50)",
            {"batch_size=4": "batch_size=4, objective='distill', carry_state=True"},
            "teacher, frozen: ",
        ),
    ],
    ids=["LoRA with dropout", "a teacher whose state is carried"],
)
def test_a_kill_leaves_no_trace_of_runs_whose_checkpoints_lack_a_part(
    place: Workplace, unbroken: Path, tmp_path: Path, fields: str, changes: dict[str, str], said: str
) -> None:
    """The base of an adapter, or a teacher."""
    config = CONFIG.replace("        model=", f"        {fields.format(base=str(unbroken))},\n        model=")
    config = config.replace("held_out=0.2", f"held_out=0.2, tokenizer={str(unbroken)!r}")
    for old, new in changes.items():
        config = config.replace(old, new)
    assert said in read_log(killed_and_resumed(Workplace(tmp_path, place.folder / "programs", config)))


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param("generation='7b', deep_embed_rank=4, dea_width=16, dea_rank=4, context_length=64", id="7b"),
        pytest.param("generation='8-rc00'", id="8-rc00"),
    ],
)
def test_a_kill_leaves_no_trace_of_tables_by_token(place: Workplace, tmp_path: Path, sizes: str) -> None:
    """Whose optimizer's moments are zero in rows that no batch has had; and of attention beside time mixing."""
    config = CONFIG.replace("ModelConfig(", f"ModelConfig({sizes}, ")
    killed_and_resumed(Workplace(tmp_path, place.folder / "programs", config))


def killed_and_resumed(place: Workplace) -> Path:
    """The folder of a run that was killed, and ended with the bits of one that was not."""
    whole, run_dir = place.folder / "whole", place.folder / "killed"
    place.finish(place.command(whole), whole)
    kill_one([place.start(place.command(run_dir), run_dir)], 0, run_dir, 6, random.Random(3))
    place.finish(place.command(run_dir), run_dir)
    place.assert_same_end(whole, run_dir)
    return run_dir


@pytest.mark.long
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    place = Workplace(tmp_path, tmp_path / "programs", CONFIG, as_users=True)
    steps = ("--training.num-steps", "200")
    unbroken, killed, draws = place.folder / "unbroken200", place.folder / "killed200", random.Random(20)
    place.finish(place.command(unbroken, *steps), unbroken)
    for number in range(20):
        process = place.start(place.command(killed, *steps), killed)
        kill_one([process], 0, killed, 8 * number + 2 * draws.randint(1, 4), draws)
    place.finish(place.command(killed, *steps), killed)
    place.assert_same_end(unbroken, killed)


@pytest.mark.long
def test_signals_save_and_print_the_command_that_goes_on(place: Workplace, unbroken: Path) -> None:
    run_dir = place.folder / "my signaled run"  # with blanks, so that the printed command has something to quote
    command = place.command(run_dir)
    for number, target in ((signal.SIGTERM, 2), (signal.SIGINT, 8)):
        before = len(read_log(run_dir))
        process = place.start(command, run_dir)
        wait_for_step([process], run_dir, target)
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
    assert_same_bits(place.final_state(unbroken), place.final_state(run_dir))


@pytest.mark.long
def test_a_second_run_in_the_same_folder_is_refused(place: Workplace) -> None:
    run_dir = place.folder / "twice"
    command = place.command(run_dir, "--training.num-steps", "1000")
    first = place.start(command, run_dir)
    wait_for_step([first], run_dir, 2)
    second = place.start(command, run_dir, index=1)
    assert second.wait(PATIENCE) == 1
    assert f"process {first.pid} of " in log_file(run_dir, 1).read_text()
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE) == 0
    assert "saved after step" in read_log(run_dir)
