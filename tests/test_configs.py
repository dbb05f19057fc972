"""Every config file builds, and says how it is run; every generation runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Generation,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.step import abstract_state, make_trainer
from train import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
RUN_HERE = [path for path in CONFIGS if path.name.startswith("python_stdlib")]
"""tests/test_recipes.py has the others, which were planned and never run."""


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_builds_a_model_of_the_size_it_says(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    params = abstract_state(make_trainer(config)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.model.num_parameters()


@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: path.name)
def test_docstring_gives_the_command_and_what_was_seen(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python train.py configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*nats.*bits a byte", docstring, re.DOTALL)


def test_no_two_configs_share_a_run_folder() -> None:
    folders = [load_config(path).run_dir for path in CONFIGS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("generation", ["4", *(pytest.param(name, marks=pytest.mark.long) for name in ("5.2", "6"))])
def test_every_generation_runs_from_beginning_to_end(generation: Generation, tmp_path: Path) -> None:
    """RWKV-7 does in tests/test_train.py, which looks closer."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(24):
        text = "\n".join(f"def f{i}_{j}(x):\n    return x * {j} + {i * j}\n" for j in range(20))
        (source / f"{i}.py").write_text(text)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(generation, vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source=str(source), cache_dir=str(tmp_path / "cache"), held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=3),
        training=TrainingConfig(num_steps=12, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=12, batches=2, sample_tokens=4, sample_prompts=("def",)),
        checkpoint=CheckpointConfig(every=12),
        logging=LoggingConfig(every=2),
    )
    result = train(config)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 1
    assert result.held_out is not None
    assert result.held_out.loss < losses[0] - 1
    assert all(record["text"] for record in records if record["kind"] == "sample")
