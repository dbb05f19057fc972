"""Runs of seconds: a corpus and a config for them, and what they must come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.training.loop import train
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.state import TrainState

CODE = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(200))
"""Enough for a tokenizer of 300 entries."""


def write_corpus(folder: Path, factor: int = 1) -> Path:
    """Two dozen files of code in a new folder; another factor gives other text."""
    folder.mkdir()
    for i in range(24):
        lines = [f"def f{i}_{j}(x):\n    return x * {j} + {factor * i * j}\n" for j in range(20)]
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


def small_config(model: ModelConfig, folder: Path) -> TrainConfig:
    """A run of a model with a vocabulary of 300, all of which lies in a folder."""
    return TrainConfig(
        run_dir=str(folder / "run"),
        model=model,
        data=DataConfig(source=str(write_corpus(folder / "source")), cache_dir=str(folder / "cache"), held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=3),
        training=StepConfig(num_steps=12, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=12, batches=2, sample_tokens=4, sample_prompts=("def",)),
        checkpoint=CheckpointConfig(every=12),
        logging=LoggingConfig(every=2),
    )


def train_and_learn(config: TrainConfig) -> TrainState:
    """The state at the end of a run; fails unless it has learned, and has been sampled from."""
    result = train(config)
    records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 1
    assert result.held_out is not None
    assert result.held_out.loss < losses[0] - 1
    samples = [record["text"] for record in records if record["kind"] == "sample"]
    assert samples
    assert all(samples)
    return result.state


def names_in(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def assert_same_bits(left: Any, right: Any) -> None:
    """Fails unless two trees hold the same arrays, bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
