"""An application goes through everything that a run of a language model does; tests/applications/toy.py is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.cli.train_config import parse_train_config
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ParallelConfig,
    StepConfig,
    TuningConfig,
    from_dict,
    to_dict,
)
from rwkv_jax.training.application import load_application
from rwkv_jax.training.examples import Examples
from rwkv_jax.training.loop import train
from rwkv_jax.weights.pretrained import from_pretrained
from tests.applications import toy
from tests.fake_devices import run_on_fake_devices

LATER = ("vision", "seq2seq", "series")
"""Applications whose meshes long tests have."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    return run_dir, train(toy.config(str(run_dir)))


def test_a_run_learns_reports_and_saves(run: tuple[Path, Any]) -> None:
    run_dir, result = run
    assert result.measured.metrics.keys() == {"accuracy"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] == pytest.approx(np.log(2), abs=0.01)
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    assert all(0 <= line["accuracy"] <= 1 for line in evaluated)
    assert json.loads((run_dir / "tokenizer.kind.json").read_text())["symbols"] == ["one", "two"]


def test_held_out_means_are_those_of_all_examples(run: tuple[Path, Any]) -> None:
    """21 examples in batches of 16: what fills up the last batch does not count."""
    run_dir, result = run
    application, model = load_application(str(run_dir), "newest")
    _, held_out = application.examples(print)
    assert held_out is not None
    losses, metrics = model.losses(held_out.arrays, toy.Forward())
    assert result.measured.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert result.measured.metrics["accuracy"] == pytest.approx(float(np.mean(metrics["accuracy"])), rel=1e-6)


def test_averages_are_loaded_where_they_are_evaluated(tmp_path: Path) -> None:
    config = toy.config(str(tmp_path / "run"))
    training = dataclasses.replace(config.training, num_steps=3, ema_decay=0.5)
    evaluation = EvaluationConfig(every=3, batches=1, sample_prompts=(), ema=True)
    checkpoint = CheckpointConfig(every=3)
    result = train(dataclasses.replace(config, training=training, evaluation=evaluation, checkpoint=checkpoint))
    _, model = load_application(str(tmp_path / "run"), "newest")
    found, averages = model.classes.weight[...], result.state.ema["classes"]["weight"]
    np.testing.assert_array_equal(found, averages)
    assert np.any(np.asarray(averages) != np.asarray(result.state.params["classes"]["weight"]))
    with pytest.raises(ConfigError, match="which = 'bset': no such checkpoint; did you mean best"):
        load_application(str(tmp_path / "run"), "bset")  # pyright: ignore[reportArgumentType]


def test_a_stopped_run_goes_on_with_the_same_bits(run: tuple[Path, Any], tmp_path: Path) -> None:
    _, result = run
    config = toy.config(str(tmp_path / "run"))
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=3)))
    resumed = train(config)
    for found, expected in zip(*map(jax.tree.leaves, (resumed.state, result.state)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_config_survives_json(tmp_path: Path) -> None:
    config = toy.config(str(tmp_path), majority=toy.Majority(num_examples=32))
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert type(again) is toy.MajorityConfig
    assert again == config
    with pytest.raises(ConfigError, match="application = 'majorities': no such application; did you mean majority"):
        from_dict(to_dict(config) | {"application": "majorities"})


def test_a_run_of_other_settings_is_not_resumed(run: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match=r"majority.num_examples +64 +32"):
        train(toy.config(str(run[0]), majority=toy.Majority(num_examples=32)))


def test_flags_change_its_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "majority.py"
    path.write_text("from tests.applications import toy\n\ndef config():\n    return toy.config('runs/majority')\n")
    config = parse_train_config([str(path), "--majority.num-examples", "48"])
    assert isinstance(config, toy.MajorityConfig)
    assert config.majority.num_examples == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": StepConfig(carry_state=True)}, "training.carry_state = True: each row is by itself"),
        ({"parallel": ParallelConfig(sequence=3)}, "parallel.sequence = 3: majority cannot split time"),
        ({"evaluation": EvaluationConfig()}, "evaluation.sample_prompts .*majority writes no text"),
        ({"initial_weights": "x.pth"}, "initial_weights = 'x.pth': majority begins with random parameters"),
        ({"tuning": TuningConfig("lora")}, "tuning = .*majority begins with random parameters"),
        ({"data": DataConfig(source="x.txt")}, "data.source = 'x.txt': .*has its own data, set by majority"),
        ({"training": StepConfig(loss_chunk=8)}, "training.loss_chunk = 8"),
    ],
)
def test_what_it_does_not_have_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        toy.config(str(tmp_path), **changes)


@pytest.mark.parametrize("name", ["majority", "audio", *(pytest.param(n, marks=pytest.mark.long) for n in LATER)])
def test_meshes_change_nothing(name: str) -> None:
    """Of losses, metrics and gradients, over rows, sharded weights and heads; of micro-batches and recomputation."""
    found = run_on_fake_devices(8, "tests.applications.meshes", name)
    assert len(found) >= 2
    for errors in found.values():
        assert errors.keys() == {"loss", "metrics", "gradients"}
        assert max(errors["loss"], errors["gradients"]) < 1e-11
        assert errors["metrics"] < 1e-6  # some are summed in float32


def test_examples_of_different_numbers_are_refused() -> None:
    arrays = toy.Batch(np.zeros((3, 9), np.int32), np.zeros(2, np.int32), np.ones(3, np.float32))
    with pytest.raises(ConfigError, match=r"examples: arrays of \[2, 3\] rows"):
        Examples(arrays, name="row")


def test_augmentation_depends_on_seed_step_and_row_alone() -> None:
    arrays = toy.Batch(np.zeros((4, 3), np.int32), np.zeros(4, np.int32), np.ones(4, np.float32))
    examples = Examples(arrays, augment=lambda row, draws: row._replace(tokens=draws.integers(0, 99, 3, np.int32)))
    draws = [lambda row, step=step: np.random.default_rng([step, row]) for step in (1, 2)]
    whole = examples.rows(np.arange(4), draws[0]).tokens
    np.testing.assert_array_equal(examples.rows(np.arange(2, 4), lambda row: draws[0](row + 2)).tokens, whole[2:])
    assert np.any(examples.rows(np.arange(4), draws[1]).tokens != whole)
    assert not np.any(examples.rows(np.arange(4)).tokens)


def test_its_run_is_no_language_model(run: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="is a run of the application majority"):
        from_pretrained(str(run[0]))
