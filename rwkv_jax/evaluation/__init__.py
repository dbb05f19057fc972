"""Evaluation: tasks in their own file formats, and how good a model is at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.evaluation.engine_scorer import EngineScorer, options_for
    from rwkv_jax.evaluation.report import Report
    from rwkv_jax.evaluation.requests import Generate, Loglikelihood, LoglikelihoodResult, Rolling, Scorer
    from rwkv_jax.evaluation.run import evaluate
    from rwkv_jax.evaluation.statistics import Estimate
    from rwkv_jax.evaluation.tasks import TASKS, find_task
    from rwkv_jax.evaluation.tasks.base import Task, make_cases
    from rwkv_jax.evaluation.tasks.plans import plan_tasks

__all__ = [
    "TASKS",
    "EngineScorer",
    "Estimate",
    "Generate",
    "Loglikelihood",
    "LoglikelihoodResult",
    "Report",
    "Rolling",
    "Scorer",
    "Task",
    "evaluate",
    "find_task",
    "make_cases",
    "options_for",
    "plan_tasks",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "requests": ("Generate", "Loglikelihood", "LoglikelihoodResult", "Rolling", "Scorer"),
        "engine_scorer": ("EngineScorer", "options_for"),
        "report": ("Report",),
        "run": ("evaluate",),
        "statistics": ("Estimate",),
        "tasks": ("TASKS", "find_task"),
        "tasks.base": ("Task", "make_cases"),
        "tasks.plans": ("plan_tasks",),
    },
)
