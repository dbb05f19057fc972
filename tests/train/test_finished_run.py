"""`train(config)`: what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rwkv_jax.config import to_dict
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.held_out import compressed_bits_per_byte
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.versions import versions
from rwkv_jax.weights.pretrained import convert
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, restore, steps_of


def test_folder_holds_all_that_a_run_leaves(finished: Run) -> None:
    expected = [".lock", "best", "checkpoints", "loss.png", "metrics.jsonl", "profile", "run.json", "tokenizer.model"]
    assert names_in(finished.folder) == expected
    assert names_in(finished.folder / "checkpoints") == ["4", "8"]


def test_metrics_have_every_interval_evaluation_and_sample(finished: Run) -> None:
    assert steps_of(finished.folder, "train") == [2, 4, 6, 8]
    assert steps_of(finished.folder, "evaluation") == [3, 6, 8]
    samples = [record for record in read_metrics(finished.folder / "metrics.jsonl") if record["kind"] == "sample"]
    # One prompt in turn at each evaluation, all of them at the end.
    assert [(record["step"], record["prompt"]) for record in samples] == [
        (3, "x"),
        (6, "def"),
        (8, "def"),
        (8, "x"),
    ]
    assert all(record["text"] for record in samples)


def test_model_learns(finished: Run) -> None:
    losses = [record["loss"] for record in read_metrics(finished.folder / "metrics.jsonl") if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5


def test_best_checkpoint_is_of_the_lowest_held_out_loss(finished: Run) -> None:
    records = read_metrics(finished.folder / "metrics.jsonl")
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "evaluation"}
    (best,) = names_in(finished.folder / "best")
    assert losses[int(best)] == min(losses.values())
    with ckpt.Checkpoints(finished.folder, 2, pytest.fail) as checkpoints:
        assert checkpoints.best_loss() == min(losses.values())


def test_result_is_the_saved_state_and_the_loss_of_all_held_out_text(finished: Run) -> None:
    assert_same_bits(restore(finished.config, finished.folder), finished.result.state)
    held_out = finished.result.held_out
    assert held_out is not None
    assert f"all held-out text: loss {held_out.loss:.4f} nats" in finished.output
    assert f"this model {held_out.bits_per_byte:.3f}" in finished.output


def test_compressors_are_measured_on_the_held_out_text(finished: Run) -> None:
    corpus = prepare_corpus(finished.config.data, 300, lambda line: None)
    for name, value in compressed_bits_per_byte(corpus.held_out_bytes()).items():
        assert f"{name} {value:.3f}" in finished.output


@pytest.mark.parametrize("function", ["train_step", "eval_step", "_advance_some", "init"])
def test_each_program_is_compiled_once(finished: Run, function: str) -> None:
    compiled = {name: count for name, count in finished.compiled.items() if function in name}
    assert list(compiled.values()) == [1], finished.compiled


def test_the_steps_asked_for_are_traced(finished: Run) -> None:
    assert "trace of steps (2, 3) written to" in finished.output
    traces = [path for path in (finished.folder / "profile").rglob("*") if path.is_file()]
    assert traces
    assert all(path.stat().st_size > 0 for path in traces)


def test_run_file_tells_the_config(finished: Run) -> None:
    saved = json.loads((finished.folder / "run.json").read_text())
    assert to_dict(finished.config) == to_dict(
        dataclasses.replace(finished.config, **{"profile": tuple(saved["config"]["profile"])})
    )
    assert saved["config"]["model"]["width"] == 32
    assert saved["config"]["run_dir"] == str(finished.folder)


def test_a_card_tells_of_the_run(finished: Run, tmp_path: Path) -> None:
    saved = json.loads((finished.folder / "run.json").read_text())
    assert saved["made_with"] == versions()
    convert(finished.folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    training = finished.config.training
    tokens = 8 * training.batch_size * training.sequence_length
    records = [record for record in read_metrics(finished.folder / "metrics.jsonl") if record["kind"] == "evaluation"]
    for told in (
        f"| tokens seen | {tokens:,}, in rows of",
        f"| fingerprint of the data | {saved['identity']['corpus']} |",
        f"| bits a byte, held out | {records[-1]['bits_per_byte']:.5g}, after step {records[-1]['step']} |",
        "## Trained with",
    ):
        assert told in card
    assert str(finished.folder.parent) not in card
