"""Evaluation tasks of a run: their items, read before the first step, and their metrics after some of the steps."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

from rwkv_jax.config import ConfigError, EvaluationConfig, TrainConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation.requests import answer
from rwkv_jax.evaluation.tasks.base import Summary
from rwkv_jax.evaluation.tasks.plans import Plan, plan_tasks
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.sample import Sampler
from rwkv_jax.training.task_scorer import TaskScorer


class TaskResult(NamedTuple):
    """What a task has found of a run."""

    summary: Summary
    num_fewshot: int
    """Examples in each prompt."""
    num_requests: int
    num_truncated: int
    """Requests of which the beginning was left out, since the run's batches or the model's context cannot hold it."""


def read_tasks(evaluation: EvaluationConfig) -> list[Plan]:
    """The tasks that a config names.

    Raises:
      ConfigError: an unknown task, a file that is missing or malformed, or more examples than there are.
    """
    tasks, examples = (
        dict(pair.split("=", 1) for pair in pairs) for pairs in (evaluation.tasks, evaluation.task_examples)
    )
    if not (tasks or examples):
        return []
    try:
        return plan_tasks(
            tasks,
            num_fewshot=evaluation.task_num_fewshot,
            examples=examples,
            limit=evaluation.task_items,
            seed=evaluation.task_seed,
        )
    except ConfigError as error:
        message = str(error)
        field = re.match("(tasks|num_fewshot|examples)(?= =|:)", message)
        own = "tasks: " if field is None else "task_" * (field[1] != "tasks")
        raise ConfigError(f"evaluation.{own}{message}") from error


def fingerprint(tasks: list[Plan]) -> str:
    """A digest of all that is asked, the same in all processes of a run."""
    asked = [(plan.task.name, plan.task.version, [case.requests for case in plan.cases]) for plan in tasks]
    return hashlib.blake2b(repr(asked).encode(), digest_size=16).hexdigest()


def runs_tasks(evaluation: EvaluationConfig, done: int, num_steps: int) -> bool:
    """Whether tasks run after this many steps."""
    return bool(evaluation.tasks) and (done % (evaluation.task_every or evaluation.every) == 0 or done == num_steps)


def prepared_scorer(
    tasks: list[Plan], trainer: TrainFunctions, config: TrainConfig, tokenizer: Tokenizer, sampler: Sampler
) -> TaskScorer:
    """A scorer that has encoded all that the tasks ask."""
    scorer = TaskScorer(trainer, config.model, config.training, tokenizer, sampler)
    scorer.prepare(request for plan in tasks for case in plan.cases for request in case.requests)
    return scorer


def evaluate_tasks(tasks: list[Plan], scorer: TaskScorer, params: Any) -> dict[str, TaskResult]:
    """What each task finds, by name."""
    found = {}
    for plan in tasks:
        requests = [request for case in plan.cases for request in case.requests]
        results = iter(answer(scorer.of(params), requests))
        scores = [plan.task.score(case.item, [next(results) for _ in case.requests]) for case in plan.cases]
        summary = plan.task.aggregate(scores, [case.group for case in plan.cases])
        num_truncated = sum(map(scorer.is_truncated, requests))
        found[plan.task.name] = TaskResult(summary, plan.num_fewshot, len(requests), num_truncated)
    return found
