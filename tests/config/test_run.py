"""Whole runs: sections that contradict each other are refused, and nothing can be changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rwkv_jax.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StepConfig,
    TrainConfig,
)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"run_dir": ""}, "run_dir = '': name a folder"),
    ({"seed": -1}, "seed = -1: "),
    ({"seed": 2**32}, f"seed = {2**32}: "),
    ({"profile": (5, 3)}, r"profile = \(5, 3\): "),
    (
        {"training": StepConfig(num_steps=10), "optimizer": OptimizerConfig(warmup_steps=10)},
        "optimizer.warmup_steps = 10: must be less than training.num_steps = 10",
    ),
    (
        {"model": ModelConfig(architecture="transformer"), "training": StepConfig(carry_state=True)},
        "training.carry_state = True: a Transformer's state has room for model.context_length tokens only",
    ),
    (
        {"model": ModelConfig(architecture="transformer"), "parallel": ParallelConfig(sequence=2)},
        "parallel.sequence = 2: a Transformer's attention is not split over time; use parallel.data, fsdp or tensor",
    ),
    (
        {"model": ModelConfig(architecture="transformer", context_length=511)},
        "training.sequence_length = 512: must be at most model.context_length = 511; make one shorter or the other",
    ),
    (
        {"training": StepConfig(carry_state=True), "data": DataConfig(order="official")},
        "data.order = 'official': training.carry_state reads each row on from where it stopped; leave data.order out",
    ),
    ({"initial_weights": "model.pth"}, "data.tokenizer = None: initial_weights = 'model.pth' were trained with a"),
    (
        {"training": StepConfig(sequence_length=512), "parallel": ParallelConfig(sequence=3)},
        "training.sequence_length = 512: must be a multiple of parallel.sequence = 3",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainConfig(**values)


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # pyright: ignore[reportAttributeAccessIssue]
