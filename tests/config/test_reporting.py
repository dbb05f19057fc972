"""Evaluations, checkpoints and logs: what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rwkv_jax.config import CheckpointConfig, ConfigError, EvaluationConfig, LoggingConfig

WRONG: list[tuple[type, dict[str, Any], str]] = [
    *(
        (EvaluationConfig, {name: 0}, f"evaluation.{name} = 0: ")
        for name in ("every", "batches", "sample_tokens", "task_every", "task_items")
    ),
    (EvaluationConfig, {"tasks": ("lambada",)}, "evaluation.tasks = "),
    (EvaluationConfig, {"tasks": ("a=x", "a=y")}, "evaluation.tasks = "),
    (EvaluationConfig, {"task_num_fewshot": -1}, "evaluation.task_num_fewshot = -1: "),
    (EvaluationConfig, {"task_examples": ("lambada",)}, "evaluation.task_examples = "),
    (EvaluationConfig, {"sample_temperature": -1.0}, "evaluation.sample_temperature = -1.0: "),
    (EvaluationConfig, {"sample_top_p": 0.0}, "evaluation.sample_top_p = 0.0: "),
    (EvaluationConfig, {"sample_top_p": 1.5}, "evaluation.sample_top_p = 1.5: "),
    (EvaluationConfig, {"sample_prompts": ("a", "caf\udcc3\udca9")}, "evaluation.sample_prompts = "),
    *((CheckpointConfig, {name: 0}, f"checkpoint.{name} = 0: ") for name in ("every", "keep")),
    (LoggingConfig, {"every": 0}, "logging.every = 0: "),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG, ids=[message.split(":")[0] for _, _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        kind(**values)
