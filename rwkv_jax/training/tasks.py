"""Evaluation tasks of a run: their items, read before the first step, and their metrics after some of the steps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.config import ConfigError, EvaluationConfig, TrainConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation.requests import answer
from rwkv_jax.evaluation.tasks import find_task
from rwkv_jax.evaluation.tasks.base import Case, Summary, Task, make_cases
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.task_scorer import TaskScorer


class RunTask(NamedTuple):
    """A task with the items that a run evaluates."""

    task: Task[Any]
    cases: list[Case[Any]]


def read_tasks(evaluation: EvaluationConfig) -> list[RunTask]:
    """The tasks that a config names.

    Raises:
      ConfigError: an unknown task, or a file that is missing or malformed.
    """
    found = []
    for name, _, path in (each.partition("=") for each in evaluation.tasks):
        try:
            task = find_task(name)
            found.append(RunTask(task, make_cases(task, Path(path).expanduser(), limit=evaluation.task_items)))
        except ConfigError as error:
            message = str(error)
            raise ConfigError(f"evaluation.{'' if message.startswith('tasks') else 'tasks: '}{message}") from error
    return found


def fingerprint(tasks: list[RunTask]) -> str:
    """A digest of all that is asked, the same in all processes of a run."""
    asked = [(task.name, task.version, [case.requests for case in cases]) for task, cases in tasks]
    return hashlib.blake2b(repr(asked).encode(), digest_size=16).hexdigest()


def runs_tasks(evaluation: EvaluationConfig, done: int, num_steps: int) -> bool:
    """Whether tasks run after this many steps."""
    return bool(evaluation.tasks) and (done % (evaluation.task_every or evaluation.every) == 0 or done == num_steps)


def prepared_scorer(
    tasks: list[RunTask], trainer: TrainFunctions, config: TrainConfig, tokenizer: Tokenizer, sampler: Sampler
) -> TaskScorer:
    """A scorer that has encoded all that the tasks ask."""
    scorer = TaskScorer(trainer, config.model, config.training, tokenizer, sampler)
    scorer.prepare(request for task in tasks for case in task.cases for request in case.requests)
    return scorer


def evaluate_tasks(tasks: list[RunTask], scorer: TaskScorer, params: Any) -> dict[str, Summary]:
    """Metrics of each task, by name."""
    found = {}
    for task, cases in tasks:
        requests = [request for case in cases for request in case.requests]
        results = iter(answer(scorer.of(params), requests))
        scores = [task.score(case.item, [next(results) for _ in case.requests]) for case in cases]
        found[task.name] = task.aggregate(scores, [case.group for case in cases])
    return found
