"""A run on chats: what it reports of them, that it learns, and that it goes on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from rwkv_jax.cli.flags import chat_format_of
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
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, run

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def write_chats(path: Path, count: int = 24) -> Path:
    """Questions of some numbers, the last one too long for a row."""
    chats = [
        {"conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": "It is it."}]}
        for i in range(count)
    ]
    chats.append({"conversations": [{"from": "human", "value": "a" * 200}, {"from": "gpt", "value": "b"}]})
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    source = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")
    return TrainConfig(
        model=ModelConfig("4", vocab_size=257, num_layers=2, width=32, wkv_implementation="scan"),
        data=DataConfig(
            source=str(source), chat="auto", tokenizer="bytes", held_out=0.2, chat_format="raven", chat_too_long="drop"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=2),
        training=StepConfig(num_steps=12, batch_size=4, sequence_length=96),
        evaluation=EvaluationConfig(every=6, batches=2, sample_prompts=("Bob: What is 3?\n\nAlice:",), sample_tokens=8),
        checkpoint=CheckpointConfig(every=6),
        logging=LoggingConfig(every=3),
    )


@pytest.fixture(scope="module")
def chats(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(config, tmp_path_factory.mktemp("run") / "run")


def test_what_was_read_and_left_out_is_in_the_log(chats: Run) -> None:
    first, *others = read_metrics(chats.folder / "metrics.jsonl")
    assert (first["kind"], first["step"], first["chats"], first["too_long"], first["dropped"]) == ("data", 0, 25, 1, 1)
    assert first["training"] + first["held_out"] == 24
    assert {record["kind"] for record in others} == {"train", "evaluation", "sample"}
    assert "longer than training.sequence_length = 96: 1 of 25 chats; 1 left out" in chats.output
    assert " epochs of " in chats.output


def test_the_loss_is_one_of_tokens_that_count_and_not_of_bytes(chats: Run) -> None:
    records = read_metrics(chats.folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 1
    assert chats.result.held_out is not None
    assert chats.result.held_out.bits_per_byte is None
    assert chats.result.held_out.loss < losses[0] - 1
    assert not [name for record in records for name in record if "bits" in name]
    assert f"all held-out chats: loss {chats.result.held_out.loss:.4f} per token that counts" in chats.output


def test_a_run_that_was_stopped_ends_with_the_same_bits(chats: Run, config: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(chats.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    resumed = run(config, tmp_path / "run")
    assert "resuming after step 6" in resumed.output
    assert_same_bits(resumed.result.state, chats.result.state)
    assert read_figures(tmp_path / "run") == read_figures(chats.folder)


def test_other_options_and_other_chats_are_another_run(chats: Run, config: TrainConfig, tmp_path: Path) -> None:
    for name, value in (("chat_loss", "last"), ("chat_rows", "apart")):
        data = dataclasses.replace(config.data, **{name: value})
        with pytest.raises(ConfigError, match=rf"holds another run[\s\S]*data\.{name}"):
            loop.train(dataclasses.replace(config, data=data, run_dir=str(chats.folder)))
    source = write_chats(tmp_path / "chats.jsonl", 23)
    data = dataclasses.replace(config.data, source=str(source))
    with pytest.raises(ConfigError, match=r"holds another run[\s\S]*corpus"):
        loop.train(dataclasses.replace(config, data=data, run_dir=str(chats.folder)))


def test_a_run_is_asked_in_the_format_that_it_was_trained_on(chats: Run) -> None:
    assert chat_format_of(chats.folder) == "raven"
    assert chat_format_of(chats.folder / "checkpoints") is None


def test_chats_in_a_row_are_never_seen_by_each_other(config: TrainConfig) -> None:
    training = dataclasses.replace(config.training, reset_at_documents=False)
    with pytest.raises(ConfigError, match=r"training\.reset_at_documents = False: chats in a row would see each other"):
        dataclasses.replace(config, training=training)
    apart = dataclasses.replace(config.data, chat_rows="apart")
    dataclasses.replace(config, training=training, data=apart)


def test_texts_are_read_beside_chats_and_both_evaluated(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is what it is.\n" * 200)
    mixture = ((f"chat:{config.data.source}", 1.0), (str(tmp_path / "text.txt"), 1.0))
    data = dataclasses.replace(
        config.data, source=DataConfig.source, mixture=mixture, cache_dir=str(tmp_path / "cache")
    )
    config = dataclasses.replace(config, data=data)
    found = run(config, tmp_path / "run")
    first, *records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["kind"], first["chats"], first["dropped"]) == ("data", 25, 1)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert evaluations[-1]["texts.bits_per_byte"] < evaluations[0]["texts.bits_per_byte"]
    assert found.result.held_out is not None
    assert found.result.held_out.texts is not None
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert "50.00% (" in found.output
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    resumed = run(config, tmp_path / "run")
    assert_same_bits(resumed.result.state, found.result.state)
    assert resumed.result.held_out == found.result.held_out
    other = dataclasses.replace(data, mixture=(mixture[0], (mixture[1][0], 2.0)))
    with pytest.raises(ConfigError, match=r"holds another run[\s\S]*corpus"):
        loop.train(dataclasses.replace(config, data=other, run_dir=str(tmp_path / "run")))


@pytest.mark.long
def test_states_are_carried_through_chats_longer_than_a_row(config: TrainConfig, tmp_path: Path) -> None:
    training = dataclasses.replace(config.training, sequence_length=32, carry_state=True)
    found = run(dataclasses.replace(config, training=training), tmp_path / "run")
    records = read_metrics(found.folder / "metrics.jsonl")
    assert (records[0]["too_long"], records[0]["training"] + records[0]["held_out"]) == (0, 25)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    again = run(dataclasses.replace(config, training=training), tmp_path / "run")
    assert_same_bits(again.result.state, found.result.state)
