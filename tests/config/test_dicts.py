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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "3"}, "seed = '3': must be a whole number"),
        ({"seed": True}, "seed = True: must be a whole number"),
        ({"seed": 1.0}, "seed = 1.0: must be a whole number"),
        ({"model": {"width": None}}, "model.width = None: must be a whole number"),
        ({"model": {"width": 10**30}}, "model.width = 10.*: must be a whole number"),
        ({"model": {"ffn_width": "4"}}, "model.ffn_width = '4': must be a whole number or null"),
        ({"model": []}, r"model = \[\]: must be an object: fields and their values"),
        ({"model": {"dtype": ["float32"]}}, r"model.dtype = \('float32',\): must be float32 or bfloat16 or float64"),
        ({"optimizer": {"learning_rate": "high"}}, "optimizer.learning_rate = 'high': must be a number"),
        ({"evaluation": {"sample_prompts": "def"}}, "evaluation.sample_prompts = 'def': must be a list of text"),
        ({"data": {"mixture": [["a"]]}}, r"data.mixture = \(\('a',\),\): must be a list of a list of text, then a num"),
        ({"checkpoint": {"every": [1]}}, r"checkpoint.every = \(1,\): must be a whole number"),
        ({"data": {"held_out": {}}}, r"data.held_out = {}: must be a number"),
        ({"profile": [1, 2, 3]}, r"profile = \(1, 2, 3\): must be a list of a whole number, then a whole number or nu"),
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict(values)


WRONG = [None, True, -1, 1.5, 1e308, 2**64, "", "x", "\ud800", [], [[]], [1, "x"], {}, {"a": 1}]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_whatever_stands_in_a_field_nothing_but_config_errors_are_raised(value: Any) -> None:
    whole = json.loads(json.dumps(to_dict(EVERYTHING)))
    places = [(whole, name) for name in whole]
    places += [(section, name) for section in whole.values() if isinstance(section, dict) for name in section]
    refused = 0
    for section, name in places:
        before, section[name] = section[name], value
        try:
            from_dict(whole)
        except ConfigError:
            refused += 1
        section[name] = before
    assert refused > len(places) // 3
