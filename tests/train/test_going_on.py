"""`train(config)` on the folder of a run: it goes on, whatever is left of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from rwkv_jax.config import CheckpointConfig, ConfigError, LoggingConfig, TrainConfig
from rwkv_jax.held_out import HeldOut
from rwkv_jax.run_lock import lock_run
from rwkv_jax.training import run_data
from rwkv_jax.training.reporting.metrics import read_metrics
from tests.runs import read_figures
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, content, restore, run, steps_of

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_running_a_finished_run_again_changes_nothing(finished: Run, copy: Path) -> None:
    before = content(copy)
    again = run(finished.config, copy)
    assert again.result.held_out == finished.result.held_out
    assert_same_bits(again.result.state, finished.result.state)
    after = content(copy)
    assert before.keys() == after.keys()
    # run.json now names the copy; a picture may differ in its date.
    changed = {name for name in after if before[name] != after[name]}
    assert changed <= {"run.json", "loss.png"}


def test_more_steps_extend_the_run(finished: Run, copy: Path) -> None:
    longer = dataclasses.replace(
        finished.config,
        training=dataclasses.replace(finished.config.training, num_steps=10),
        evaluation=dataclasses.replace(finished.config.evaluation, sample_prompts=()),
        optimizer=dataclasses.replace(finished.config.optimizer, schedule="cosine"),
    )
    extended = run(longer, copy)
    assert "resuming after step 8" in extended.output
    assert "at step 9, where the run as it was would have 3.00e-03; to keep that," in extended.output
    assert int(extended.result.state.step) == 10
    assert read_figures(copy)[: len(read_figures(finished.folder))] == read_figures(finished.folder)
    assert steps_of(copy, "train") == [2, 4, 6, 8, 10]
    assert steps_of(copy, "evaluation") == [3, 6, 8, 9, 10]
    assert steps_of(copy, "sample") == [3, 6, 8, 8]  # without prompts, there is nothing to sample
    assert json.loads((copy / "run.json").read_text())["config"]["training"]["num_steps"] == 10


def test_best_checkpoint_stays_when_later_losses_are_higher(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each run's last figure is that of all held-out text, which decides nothing.
    losses = iter([2.0, 1.0, 3.0, 0.1, 1.5, 1.2, 0.1])
    monkeypatch.setattr(run_data, "evaluate", lambda *_: HeldOut(next(losses), 1.0))
    for num_steps in (8, 10):
        training = dataclasses.replace(config.training, num_steps=num_steps)
        run(dataclasses.replace(config, training=training, profile=None), tmp_path / "run")
        assert names_in(tmp_path / "run" / "best") == ["6"]
    evaluations = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert evaluations == [2.0, 1.0, 3.0, 1.5, 1.2]


def test_fewer_steps_than_the_run_has_taken_are_refused(finished: Run, copy: Path) -> None:
    shorter = dataclasses.replace(finished.config, training=dataclasses.replace(finished.config.training, num_steps=5))
    before = content(copy)
    with pytest.raises(ConfigError, match=r"training\.num_steps = 5: the run has taken 8 steps"):
        run(shorter, copy)
    after = content(copy)
    assert after == before


def test_damaged_newest_checkpoint_is_stepped_over_and_the_end_is_the_same(finished: Run, copy: Path) -> None:
    for path in (copy / "checkpoints" / "8" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    again = run(finished.config, copy)
    assert "checkpoint of step 8 is damaged" in again.output
    assert "resuming after step 4" in again.output
    assert_same_bits(again.result.state, finished.result.state)
    assert_same_bits(restore(finished.config, copy), finished.result.state)
    assert read_figures(copy) == read_figures(finished.folder)
    four, eight, aside = names_in(copy / "checkpoints")
    assert (four, eight, aside.startswith("damaged-8-")) == ("4", "8", True)


def test_run_whose_only_checkpoint_is_damaged_begins_again_when_told_to(finished: Run, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "4")
    (copy / "checkpoints" / "8" / "state" / "_METADATA").unlink()
    figures = (copy / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"none of its checkpoints is intact: 8 \(.*\)\. .* --restart"):
            run(finished.config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == figures
    again = run(finished.config, copy, restart=True)
    assert "starting: 8 steps" in again.output
    assert (copy / "set-aside-1" / "metrics.jsonl").read_bytes() == figures
    assert_same_bits(again.result.state, finished.result.state)
    assert read_figures(copy) == read_figures(finished.folder)
    assert names_in(copy / "best") == names_in(finished.folder / "best")


def test_a_run_that_stopped_within_a_logging_window_writes_the_same_lines(config: TrainConfig, tmp_path: Path) -> None:
    often = dataclasses.replace(
        config, checkpoint=CheckpointConfig(every=3, keep=9), logging=LoggingConfig(every=4), profile=None
    )
    unbroken = run(often, tmp_path / "unbroken")
    broken = Path(shutil.copytree(unbroken.folder, tmp_path / "broken"))
    for step in (6, 8):
        shutil.rmtree(broken / "checkpoints" / str(step))
    assert "resuming after step 3" in run(often, broken).output
    assert read_figures(broken) == read_figures(unbroken.folder)


@pytest.mark.parametrize(("name", "what"), [("a\\b", "a backslash"), ("a\udce9b", "the byte 0xe9, which is not UTF-8")])
def test_names_in_which_no_array_can_be_kept_are_refused(
    config: TrainConfig, tmp_path: Path, name: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=f"run_dir = .*: has {what}.*; name another"):
        run(config, tmp_path / name)
    assert names_in(tmp_path) == []


def test_a_second_run_in_the_same_folder_is_refused(finished: Run, copy: Path) -> None:
    before = content(copy)
    with lock_run(copy, pytest.fail), pytest.raises(ConfigError, match="is writing there; wait until it has ended"):
        run(finished.config, copy)
    assert content(copy) == before


def test_checkpoints_that_are_gone_are_missed(finished: Run, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    figures = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"no checkpoint, but metrics\.jsonl goes to step 8, and one was due each 4"):
        run(finished.config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == figures


def test_a_run_killed_while_its_first_save_was_written_begins_again(finished: Run, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "4")
    (copy / "checkpoints" / "8").rename(copy / "checkpoints" / "4.orbax-checkpoint-tmp")
    (copy / "checkpoints" / "4.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    again = run(finished.config, copy)
    assert "starting: 8 steps" in again.output
    assert_same_bits(again.result.state, finished.result.state)
    assert read_figures(copy) == read_figures(finished.folder)
