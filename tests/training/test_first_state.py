"""A run knows the state that it tunes on by its numbers: it may be moved, and need not stay as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, StepConfig, TrainConfig, TuningConfig, to_dict
from rwkv_jax.training.tuned import check_identity, first_state_digest
from rwkv_jax.tuning import save_tuned_state


def write_state(path: Path, seed: int) -> Path:
    draws = np.random.default_rng(seed)
    shapes = {"first_block": (2, 8, 8), "blocks": (1, 2, 8, 8)}
    save_tuned_state(path, {part: {"wkv": draws.standard_normal(shape)} for part, shape in shapes.items()})
    return path


def config_of(path: Path | str) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig("7", vocab_size=257, num_layers=2, width=16, head_dim=8),
        data=DataConfig(tokenizer="bytes"),
        initial_weights="base",
        training=StepConfig(reset_at_documents=False),
        tuning=TuningConfig(state=True, initial_state=str(path)),
    )


def identity_of(config: TrainConfig) -> dict[str, Any]:
    return run_folder.identity(config, "corpus", "tokenizer", "base", first_state_digest(config))


def saved(config: TrainConfig) -> dict[str, Any]:
    return {"config": to_dict(config), "identity": identity_of(config)}


def test_a_first_state_is_known_by_its_numbers(tmp_path: Path) -> None:
    first = config_of(write_state(tmp_path / "first.safetensors", 0))
    run = saved(first)
    moved = config_of(write_state(tmp_path / "moved.pth", 0))
    check_identity(run, identity_of(moved), moved)
    other = config_of(write_state(tmp_path / "other.safetensors", 1))
    with pytest.raises(
        ConfigError, match=r"holds another run[\s\S]*tuning\.initial_state +[0-9a-f]{64} +[0-9a-f]{64}$"
    ):
        check_identity(run, identity_of(other), other)
    (tmp_path / "first.safetensors").unlink()  # only the first step reads it
    check_identity(run, identity_of(first), first)
    write_state(tmp_path / "first.safetensors", 2)
    check_identity(run, identity_of(first), first)
    gone = config_of(tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError, match=r"tuning\.initial_state +[0-9a-f]{64} +/.*gone\.safetensors$"):
        check_identity(run, identity_of(gone), gone)


def test_runs_that_noted_its_path_go_on(tmp_path: Path) -> None:
    first = config_of(write_state(tmp_path / "first.safetensors", 0))
    run = saved(first)
    run["identity"][run_folder.FIRST_STATE] = first.tuning.initial_state
    check_identity(run, identity_of(first), first)
    without = dataclasses.replace(first, tuning=TuningConfig(state=True))
    with pytest.raises(ConfigError, match=r"tuning\.initial_state +.*first\.safetensors +-$"):
        check_identity(run, identity_of(without), without)
