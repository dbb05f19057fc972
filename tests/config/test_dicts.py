"""Configs travel through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

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
    from_dict,
    to_dict,
)

EVERYTHING = TrainConfig(
    run_dir="runs/x",
    seed=7,
    model=ModelConfig(vocab_size=100, num_layers=3, width=128, decay_rank=32, dtype="bfloat16"),
    data=DataConfig(source="text.jsonl", tokenizer="some.model"),
    optimizer=OptimizerConfig(schedule="wsd", epsilon=1e-18),
    training=StepConfig(num_steps=11, loss_chunk=64, remat="full"),
    evaluation=EvaluationConfig(sample_prompts=("a", "é\n")),
    checkpoint=CheckpointConfig(keep=5),
    logging=LoggingConfig(wandb="project"),
    profile=(3, 5),
)

MIXTURE = TrainConfig(data=DataConfig(mixture=(("a", 0.7), ("b", 0.3)), tokenizer="world"))


@pytest.mark.parametrize("config", [TrainConfig(), EVERYTHING, MIXTURE], ids=["defaults", "everything", "mixture"])
def test_a_config_survives_json(config: TrainConfig) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_take_their_defaults() -> None:
    assert from_dict({"seed": 3, "model": {"width": 128}}) == TrainConfig(seed=3, model=ModelConfig(width=128))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 3}, r"sede = \[3\]: no such field"),
        ({"model": {"depth": 3, "color": "red"}}, r"model.color, depth = \['red', 3\]: no such field"),
        ({"model": {"width": 100}}, "model.width = 100: "),
    ],
)
def test_dicts_that_are_no_config_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values)
