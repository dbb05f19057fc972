"""Averages of weights through a run, its checkpoints and what is exported; runs that end when they get no better."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rwkv_jax import from_pretrained, run_folder
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.training.best import Best
from rwkv_jax.training.loop import _best_so_far
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.weights.pretrained import convert
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, restore, run, steps_of


def changed(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    config = dataclasses.replace(config, profile=None)
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


@pytest.fixture(scope="module")
def averaging(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    own = changed(config, training={"ema_decay": 0.9}, evaluation={"ema": True, "sample_prompts": ()})
    return run(own, tmp_path_factory.mktemp("averaging") / "run")


@pytest.mark.long
def test_a_run_that_is_resumed_has_the_same_averages(averaging: Run, tmp_path: Path) -> None:
    whole = restore(averaging.config, averaging.folder)
    assert whole.ema is not None
    folder = Path(shutil.copytree(averaging.folder, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "8")
    shutil.rmtree(folder / "best")
    again = run(averaging.config, folder)
    assert "resuming after step 4" in again.output
    assert_same_bits(whole, restore(averaging.config, folder))


@pytest.mark.long
def test_averages_are_evaluated_loaded_and_exported_on_request(averaging: Run, tmp_path: Path) -> None:
    state = restore(averaging.config, averaging.folder)
    loaded = run_folder.load_model(averaging.folder, "newest", ema=True)
    assert_same_bits(loaded.params, state.ema)
    assert_same_bits(run_folder.load_model(averaging.folder, "newest").params, state.params)
    assert not np.array_equal(state.params["head"]["weight"], state.ema["head"]["weight"])
    convert(averaging.folder, tmp_path / "average.safetensors", ema=True)
    exported = from_pretrained(tmp_path / "average.safetensors")
    np.testing.assert_array_equal(exported.head.weight[...], state.ema["head"]["weight"])


def test_a_run_without_averages_has_none_to_export(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no averages of weights"):
        run_folder.load_model(finished.folder, "newest", ema=True)
    assert not any("ema" in name for name in names_in(finished.folder / "checkpoints" / "8" / "state"))
    convert(finished.folder, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="is no run"):
        convert(tmp_path / "weights.safetensors", tmp_path / "other.safetensors", ema=True)


@pytest.mark.long
def test_a_run_ends_when_no_evaluation_has_been_better(config: TrainConfig, tmp_path: Path) -> None:
    # A rate that destroys: after the first evaluation nothing is better.
    own = changed(
        config,
        optimizer={"learning_rate": 3.0, "final_learning_rate": 3.0, "warmup_steps": 2, "warmup_start": 1e-6},
        training={"num_steps": 12},
        evaluation={"every": 1, "stop_after": 3, "sample_prompts": ()},
        checkpoint={"every": 20},
    )
    stopped = run(own, tmp_path / "run")
    losses = {
        record["step"]: record["loss"]
        for record in read_metrics(stopped.folder / "metrics.jsonl")
        if record["kind"] == "evaluation"
    }
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 3 < 12
    assert names_in(stopped.folder / "best") == [str(best)]
    assert names_in(stopped.folder / "checkpoints") == [str(best + 3)]
    assert f"none was better since step {best}" in stopped.output
    assert stopped.result.held_out is not None
    # Whoever resumes it is told the same, and nothing is trained.
    again = run(own, stopped.folder)
    assert steps_of(stopped.folder, "evaluation")[-1] == best + 3
    assert re.search(r"none was better since step", again.output)


def test_the_best_by_a_figure_that_rises_is_the_highest() -> None:
    best = Best(by="lambada.accuracy", sign=-1, every=2, stop_after=2, value=float("inf"), step=0)
    assert best.takes(2, -0.1)
    assert not best.ends(4)
    assert best.takes(4, -0.3)
    assert not best.takes(6, -0.2)
    assert not best.ends(6)
    assert not best.takes(8, float("nan"))
    assert best.ends(8)


def test_without_a_best_to_compare_a_resumed_run_counts_from_where_it_goes_on(config: TrainConfig) -> None:
    own = changed(config, evaluation={"every": 2, "stop_after": 3})
    for saved in (SimpleNamespace(best_loss=lambda by: math.inf, best_step=step) for step in (None, 2)):
        best = _best_so_far(own, [], saved, 8)  # pyright: ignore[reportArgumentType]
        assert (best.step, best.ends(8), best.ends(12), best.ends(14)) == (8, False, False, True)
    found = _best_so_far(own, [], SimpleNamespace(best_loss=lambda by: 1.0, best_step=2), 8)  # pyright: ignore[reportArgumentType]
    assert (found.step, found.ends(8)) == (2, True)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"ema": True}, "the run keeps no averages"),
        ({"stop_after": 0}, "must be greater than zero"),
        ({"best_by": "lambada.accuracy"}, "must be loss, or a figure of one of"),
    ],
)
def test_what_cannot_be_is_refused(config: TrainConfig, evaluation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(config, evaluation=evaluation)
