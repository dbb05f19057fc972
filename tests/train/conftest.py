"""A run of seconds, and one that has ended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rwkv_jax.cli.program_cache import programs_kept_in
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
from rwkv_jax.training import loop
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from tests.programs import compiled_quickly
from tests.small_runs import write_corpus
from tests.train.in_process import Run, run


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles quickly and keeps programs on disk, and in memory those of equal configs: every call of `train` would
    trace and compile the same ones again, for seconds. How a run begins, goes on and ends is the question here."""
    made: dict[Any, TrainFunctions] = {}

    def make(config: TrainConfig, mesh: Any = None) -> TrainFunctions:
        read = TrainConfig(
            model=config.model,
            optimizer=config.optimizer,
            training=config.training,
            distillation=config.distillation,
            parallel=config.parallel,
            **(
                {"tuning": config.tuning, "initial_weights": "base", "data": DataConfig(tokenizer="bytes")}
                if config.tuning.is_partial
                else {}
            ),
        )
        if (read, mesh) not in made:
            made[read, mesh] = make_train_functions(read, mesh)
        return made[read, mesh]

    programs = tmp_path_factory.getbasetemp() / "programs"  # for all modules
    shared = mock.patch.object(loop, "make_train_functions", make)
    with programs_kept_in(programs), compiled_quickly(), shared:
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of seconds; its folder is for each test to name."""
    folder = tmp_path_factory.mktemp("data")
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source=str(write_corpus(folder / "source")), cache_dir=str(folder / "cache"), held_out=0.2),
        # Constant, so that the compiled step does not depend on the number of steps.
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=StepConfig(num_steps=8, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=3, batches=2, sample_tokens=8, sample_prompts=("def", "x")),
        checkpoint=CheckpointConfig(every=4, keep=2),
        logging=LoggingConfig(every=2),
        profile=(2, 3),
    )


@pytest.fixture(scope="session")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from beginning to end; not to be changed."""
    functions = mock.patch.object(loop, "make_train_functions", make_train_functions)  # of its own, to be counted
    with programs_kept_in(tmp_path_factory.getbasetemp() / "programs"), compiled_quickly(), functions:
        return run(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))
