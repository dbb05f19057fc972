"""A run on a synthetic task: what it reports, what it leaves, and that it goes on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.training import loop
from rwkv_jax.training.reporting.metrics import read_metrics
from tests.runs import read_figures
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, run

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = TrainConfig(
    # Of the generations the first compiles fastest.
    model=ModelConfig("4", vocab_size=24, num_layers=2, width=32, wkv_implementation="scan"),
    data=DataConfig(source="synthetic:recall(num_pairs=2, num_keys=4, num_values=4, distances=(3, 9))"),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=2),
    training=StepConfig(num_steps=12, batch_size=8, sequence_length=16),
    evaluation=EvaluationConfig(every=6, batches=2, lengths=(16, 20)),
    checkpoint=CheckpointConfig(every=6),
    logging=LoggingConfig(every=3),
)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(CONFIG, tmp_path_factory.mktemp("synthetic") / "run")


def test_an_evaluation_has_every_length_and_variant_beside_chance(synthetic: Run) -> None:
    answers = synthetic.result.answers
    assert answers is not None
    assert synthetic.result.held_out is None
    assert set(answers.parts) == {"length_16", "length_20", "distance_3", "distance_9"}
    assert answers.parts["length_16"] == answers._replace(parts={})
    figures = [answers, *answers.parts.values()]
    assert all(0 <= found.whole_accuracy == found.accuracy <= 1 for found in figures)  # one answer a row
    assert {found.chance for found in figures} == {0.5}
    assert len({found.loss for found in figures}) > 2
    record = read_metrics(synthetic.folder / "metrics.jsonl")[-1]
    assert (record["kind"], record["step"]) == ("evaluation", 12)
    assert record["loss"] == answers.loss
    assert record["distance_9.accuracy"] == answers.parts["distance_9"].accuracy
    assert "  length_20: loss " in synthetic.output
    assert "(chance 50.00%), whole answers " in synthetic.output
    assert "drawn from recall(num_pairs=2, " in synthetic.output


def test_symbols_have_no_bits_per_byte_and_no_samples(synthetic: Run) -> None:
    records = read_metrics(synthetic.folder / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"train", "evaluation"}
    assert not [name for record in records for name in record if "bits" in name]
    assert "bits/byte" not in synthetic.output


def test_the_loss_goes_down(synthetic: Run) -> None:
    losses = [record["loss"] for record in read_metrics(synthetic.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5


def test_the_folder_is_a_run_whose_tokenizer_has_the_symbols(synthetic: Run) -> None:
    assert {"best", "checkpoints", "loss.png", "run.json", "tokenizer.kind.json"} < set(names_in(synthetic.folder))
    tokenizer = run_folder.load_run_tokenizer(synthetic.folder)
    assert tokenizer.decode(tokenizer.encode("k0  v3\nk1 v0 . k0")) == " k0 v3 k1 v0 . k0"
    assert json.loads((synthetic.folder / "run.json").read_text())["config"]["data"]["source"] == CONFIG.data.source
    prompt = synthetic.output.splitlines()[-1].partition("--prompt ")[2]
    assert tokenizer.encode(prompt.strip("'"))


def test_a_run_that_was_stopped_ends_with_the_same_bits(synthetic: Run, tmp_path: Path) -> None:
    shutil.copytree(synthetic.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    resumed = run(CONFIG, tmp_path / "run")
    assert "resuming after step 6" in resumed.output
    assert_same_bits(resumed.result.state, synthetic.result.state)
    assert resumed.result.answers == synthetic.result.answers
    assert read_figures(tmp_path / "run") == read_figures(synthetic.folder)


def test_another_task_is_another_run(synthetic: Run) -> None:
    other = DataConfig(source=CONFIG.data.source.replace("9", "10"))
    with pytest.raises(ConfigError, match=r"holds another run[^|]*corpus"):
        loop.train(dataclasses.replace(CONFIG, data=other, run_dir=str(synthetic.folder)))


def test_what_is_wrong_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    wrong = dataclasses.replace(CONFIG, data=DataConfig(source="synthetic:recal"), run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="did you mean recall"):
        loop.train(wrong)
    assert names_in(tmp_path) == []
