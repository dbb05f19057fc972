"""Which step of a run is the best so far, and whether the run ends because none has been better for so long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rwkv_jax.checks import require_known
from rwkv_jax.config import EvaluationConfig
from rwkv_jax.evaluation.tasks.plans import Plan
from rwkv_jax.training.tasks import TaskResult

LOSS = "loss"
"""`EvaluationConfig.best_by` of held-out text."""


@dataclasses.dataclass
class Best:
    """The best evaluation so far; smaller values are better."""

    by: str
    """`EvaluationConfig.best_by`."""
    sign: int
    """-1 for a figure that is better where it is higher."""
    every: int
    """Steps between evaluations."""
    stop_after: int | None
    value: float
    """Of the best step; infinity if there is none yet."""
    step: int
    """The best step; without one, the step from which the run began or went on."""

    def takes(self, step: int, value: float) -> bool:
        """Whether a step's value is the best so far, which it is from now on."""
        if not value < self.value:
            return False
        self.value, self.step = value, step
        return True

    def of_tasks(self, results: Mapping[str, TaskResult]) -> float | None:
        """The value by which a step is judged, from the results of tasks; None if held-out text decides."""
        task, _, figure = self.by.partition(".")
        return None if self.by == LOSS else self.sign * results[task].summary.metrics[figure].value

    def ends(self, step: int) -> bool:
        """Whether `stop_after` evaluations up to this step were no better than the best one."""
        return self.stop_after is not None and step // self.every - self.step // self.every >= self.stop_after


def sign_of(evaluation: EvaluationConfig, tasks: Sequence[Plan]) -> int:
    """-1 if the figure that the best step is chosen by is better where it is higher, else 1.

    Raises:
      ConfigError: the task has no such figure.
    """
    if evaluation.best_by == LOSS:
        return 1
    metrics = {f"{plan.task.name}.{name}": metric for plan in tasks for name, metric in plan.task.metrics.items()}
    require_known(evaluation.best_by, metrics, "evaluation.best_by", "figure")
    return -1 if metrics[evaluation.best_by].higher_is_better else 1
