"""What is known of where weights are from: runs, the hub's cache, files; and no path of the machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rwkv_jax.config import DataConfig, ModelConfig, OptimizerConfig, StepConfig, TrainConfig, TuningConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.run_folder import identity, read_run_file, write_run
from rwkv_jax.weights.provenance import (
    describe_maker,
    provenance_of,
    provenance_of_source,
    result_rows,
    settings_of,
    training_rows,
)
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, random_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=257, num_layers=2, width=32, head_dim=16),
    data=DataConfig(source="/home/someone/secret/text.jsonl", tokenizer="/home/someone/own/tokenizer.json"),
    optimizer=OptimizerConfig(learning_rate=2e-3, rates=(("att.*", 0.5),)),
    training=StepConfig(num_steps=20, batch_size=4, sequence_length=32),
    seed=7,
)
RECORDS = [
    {"kind": "train", "step": 8, "loss": 1.0},
    {"kind": "evaluation", "step": 4, "loss": 3.0, "bits_per_byte": 2.5},
    {"kind": "evaluation", "step": 8, "loss": 2.0, "bits_per_byte": 1.5},
    {"kind": "evaluation", "step": 12, "loss": 9.0, "bits_per_byte": 9.5},
    {"kind": "task", "step": 8, "piqa.accuracy": 0.5, "piqa.accuracy_stderr": 0.01, "piqa.items": 100},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in ("4", "8", "10.tmp"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    of_run = identity(CONFIG, "data's fingerprint", ByteTokenizer().fingerprint)
    made_with = {"jax": "0.9", "initial weights": f"owner/base@{COMMIT}"}
    write_run(folder, dataclasses.replace(CONFIG, run_dir=str(folder)), of_run, ByteTokenizer(), None, made_with)
    lines = [*map(json.dumps, RECORDS), "no JSON", "[]", '{"kind": 5}', '{"kind": "evaluation"']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_tells_how_it_was_trained(run: Path) -> None:
    found = provenance_of(run)
    assert found.source == "a run of rwkv train"
    assert (found.base_model, found.relation) == ("owner/base", "finetune")
    assert found.trained_with == {"jax": "0.9"}
    assert found.training["started from"] == f"owner/base on the Hugging Face hub, commit {COMMIT}"
    assert found.training["steps"] == "8 of 20"
    assert found.training["tokens seen"] == "1,024, in rows of 32, 4 a step"
    assert found.training["data"] == "text.jsonl"
    assert found.training["fingerprint of the data"] == "data's fingerprint"
    assert found.training["fingerprint of the tokenizer"] == ByteTokenizer().fingerprint
    assert found.training["seed"] == "7"
    assert found.results == {
        "loss, held out": "2, after step 8",
        "bits a byte, held out": "1.5, after step 8",
        "piqa.accuracy": "0.5 +- 0.01, after step 8",
        "piqa.items": "100, after step 8",
    }
    assert provenance_of(run, step=4, ema=True).results["loss, held out"] == "3, after step 4"
    assert "averages" in str(provenance_of(run, ema=True).source)
    assert "/home" not in str(found)
    assert str(run) not in str(found)
    (run / "metrics.jsonl").unlink()
    assert not provenance_of(run).results
    assert provenance_of_source(str(run)) == provenance_of(run)


def test_the_base_does_not_depend_on_what_is_here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert provenance_of(run).base_model == "owner/base"


def test_tokens_of_pairs_are_not_counted_as_text() -> None:
    """A step on preferences reads two rows of each pair."""
    config = dataclasses.replace(
        CONFIG,
        initial_weights="base.pth",
        data=DataConfig(source="pairs.jsonl", tokenizer="bytes"),
        training=dataclasses.replace(CONFIG.training, objective="dpo"),
    )
    rows = training_rows(config, identity(config, "c", "t"), 8)
    assert rows["steps"] == "8 of 20"
    assert "tokens seen" not in rows


def test_without_checkpoints_there_are_no_tokens(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        folder.rmdir()
    assert "tokens seen" not in provenance_of(run).training


def test_settings_are_those_that_were_set() -> None:
    assert settings_of(TrainConfig()) == {}
    assert settings_of(CONFIG) == {
        "optimizer.learning_rate": "0.002",
        "optimizer.rates": "att.*, 0.5",
        "training.batch_size": "4",
        "training.sequence_length": "32",
    }


def test_a_tuning_run_names_its_base_without_its_path() -> None:
    config = dataclasses.replace(CONFIG, initial_weights="/home/someone/base.pth", tuning=TuningConfig(adapter="lora"))
    rows = training_rows(config, identity(config, "c", "t", base="digest"), 5)
    assert rows["started from"] == "base.pth"
    assert rows["trained of the base"] == "adapter"
    assert rows["digest of the base's numbers"] == "digest"
    mixture = (("/a/b.txt", 0.7), ("chat:/c/d.jsonl", 0.3))
    mixed = dataclasses.replace(CONFIG, data=DataConfig(mixture=mixture, chat="auto", tokenizer="bytes"))
    assert training_rows(mixed, {"corpus": 5}, None)["data"] == "b.txt (0.7), d.jsonl (0.3)"


def test_results_that_are_no_figures_are_left_out() -> None:
    odd = {"kind": "evaluation", "step": 1, "loss": float("nan"), "x": "text", "y": True, "z": [1]}
    assert result_rows([odd], None) == {}


def test_the_hub_s_cache_tells_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--base" / "snapshots" / COMMIT
    index = write_sharded_safetensors(folder, random_tensors(CONFIGS["7"]), max_shard_bytes=20_000)
    found = provenance_of(index)
    assert found.base_model == "owner/base"
    assert f"owner/base on the Hugging Face hub, {index.name}, commit {COMMIT}, SHA-256 of its tensors" in str(
        found.source
    )


def test_names_on_the_hub_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance_of_source("owner/base").base_model == "owner/base"
    assert provenance_of_source("owner/base/a.pth").base_model == "owner/base"
    (tmp_path / "owner").mkdir()
    for path in ("owner/base", "runs/mine", "a/b.pth", "x"):
        with pytest.raises(WeightsError, match="is no file or folder here, and no name on the Hugging Face hub"):
            provenance_of_source(path)


def test_run_json_has_what_trained_it(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--base" / "snapshots" / COMMIT
    write_safetensors(folder / "model.safetensors", random_tensors(CONFIGS["7"]))
    config = dataclasses.replace(CONFIG, initial_weights=str(folder))
    begun = describe_maker(config, None)
    assert begun["initial weights"] == f"owner/base@{COMMIT}"
    assert {"rwkv-jax", "python", "jax", "flax", "numpy"} <= begun.keys()
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", config, {}, ByteTokenizer(), None, {**begun, "jax": "0.1"})
    saved = read_run_file(tmp_path / "run")
    resumed = describe_maker(dataclasses.replace(config, initial_weights="/gone.pth"), saved)
    assert resumed == begun
    assert "initial weights" not in describe_maker(CONFIG, None)
