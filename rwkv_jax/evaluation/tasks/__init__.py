"""Evaluation tasks, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rwkv_jax.checks import require_known
from rwkv_jax.evaluation.tasks.arc import ArcChallenge, ArcEasy
from rwkv_jax.evaluation.tasks.base import Task
from rwkv_jax.evaluation.tasks.compression import Compression
from rwkv_jax.evaluation.tasks.gsm8k import Gsm8k
from rwkv_jax.evaluation.tasks.hellaswag import HellaSwag
from rwkv_jax.evaluation.tasks.lambada import Lambada
from rwkv_jax.evaluation.tasks.mmlu import Mmlu
from rwkv_jax.evaluation.tasks.piqa import Piqa
from rwkv_jax.evaluation.tasks.wikitext import WikiText
from rwkv_jax.evaluation.tasks.winogrande import Winogrande

_ALL: tuple[Task[Any], ...] = (
    Lambada(),
    Piqa(),
    HellaSwag(),
    Winogrande(),
    ArcEasy(),
    ArcChallenge(),
    WikiText(),
    Mmlu(),
    Gsm8k(),
    Compression(),
)

TASKS: Mapping[str, Task[Any]] = MappingProxyType({task.name: task for task in _ALL})
"""All tasks."""


def find_task(name: str) -> Task[Any]:
    """A task by its name. Raises ConfigError, with the nearest names, if there is none."""
    require_known(name, TASKS, "tasks", "task")
    return TASKS[name]


__all__ = ["TASKS", "Task", "find_task"]
