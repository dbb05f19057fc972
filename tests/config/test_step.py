"""The optimizer and the shape of a step: what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rwkv_jax.config import ConfigError, OptimizerConfig, StepConfig

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate = 0.0: must be greater than zero"),
    (OptimizerConfig, {"learning_rate": math.nan}, "optimizer.learning_rate = nan"),
    (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon = 0.0: must be greater than zero"),
    (OptimizerConfig, {"final_learning_rate": -1e-4}, "optimizer.final_learning_rate = -0.0001"),
    (OptimizerConfig, {"final_learning_rate": 1e-2}, "optimizer.final_learning_rate = 0.01: .*learning_rate = 0.001"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps = -1: must not be negative"),
    (OptimizerConfig, {"beta1": 1.0}, r"optimizer.beta1 = 1.0: must lie in \[0, 1\)"),
    (OptimizerConfig, {"beta2": -0.1}, r"optimizer.beta2 = -0.1: must lie in \[0, 1\)"),
    (OptimizerConfig, {"decay_fraction": 0.0}, r"optimizer.decay_fraction = 0.0: must lie in \(0, 1\]"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay = -0.1: must not be negative"),
    (OptimizerConfig, {"clip_norm": -1.0}, "optimizer.clip_norm = -1.0: must not be negative"),
    (OptimizerConfig, {"schedule": "step"}, "optimizer.schedule = 'step': must be cosine, linear, wsd, exponential"),
    (
        OptimizerConfig,
        {"schedule": "exponential", "final_learning_rate": 0.0},
        "optimizer.final_learning_rate = 0.0: must be greater than zero, .* set optimizer.schedule to wsd",
    ),
    *(
        (StepConfig, {name: 0}, f"training.{name} = 0: must be greater than zero")
        for name in ("num_steps", "batch_size", "sequence_length", "accumulation_steps", "max_bad_steps")
    ),
    (StepConfig, {"batch_size": 8, "accumulation_steps": 3}, "training.batch_size = 8: .*accumulation_steps = 3"),
    (StepConfig, {"loss_chunk": 0}, "training.loss_chunk = 0: must be positive"),
    *((StepConfig, {"fused_loss": x}, f"training.fused_loss = {x!r}: must be True or False") for x in ("no", 1, None)),
    (StepConfig, {"l2wrap": -1e-4}, "training.l2wrap = -0.0001: must not be negative"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG, ids=[message.split(":")[0] for _, _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        kind(**values)
