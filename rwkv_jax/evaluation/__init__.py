"""Evaluation: tasks in their own file formats, and how good a model is at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Rolling, Scorer
    from rwkv_jax.evaluation.statistics import Estimate
    from rwkv_jax.evaluation.tasks import TASKS, find_task
    from rwkv_jax.evaluation.tasks.base import Task, make_cases

__all__ = [
    "TASKS",
    "Estimate",
    "Generate",
    "Loglikelihood",
    "LoglikelihoodResult",
    "Rolling",
    "Scorer",
    "Task",
    "find_task",
    "make_cases",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "requests": ("Generate", "Loglikelihood", "LoglikelihoodResult", "Rolling", "Scorer"),
        "statistics": ("Estimate",),
        "tasks": ("TASKS", "find_task"),
        "tasks.base": ("Task", "make_cases"),
    },
)
