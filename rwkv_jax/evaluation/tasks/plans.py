"""Tasks with what is asked about their items: all that is known of an evaluation before there is a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.evaluation.tasks import find_task
from rwkv_jax.evaluation.tasks.base import FEW_SHOT_SEED, Case, Task, make_cases


@dataclasses.dataclass(frozen=True)
class Plan:
    """A task with all that is asked, read and checked."""

    task: Task[Any]
    cases: Sequence[Case[Any]]
    num_fewshot: int
    seed: int
    """Of the choice of examples."""
    file: str
    """Name of the file or folder, without where it lies."""


def plan_tasks(
    tasks: Mapping[str, str | Path],
    *,
    num_fewshot: int | None = None,
    examples: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    seed: int = FEW_SHOT_SEED,
) -> list[Plan]:
    """Reads the files of all tasks and makes what is asked about them; no model is needed.

    Args:
      tasks: a file or folder for each name in `TASKS`.
      num_fewshot: examples in each prompt; None takes each task's own default.
      examples: files or folders of the examples, where those that lie beside the items are not wanted.
      limit: only the first items of each task; None takes all.
      seed: of the choice of examples.

    Raises:
      ConfigError: an unknown task, files that are missing or malformed, or as `make_cases`.
    """
    if not tasks:
        raise ConfigError("tasks: there are none; give at least one, as NAME=PATH")
    found = {name: find_task(name) for name in tasks}
    if unknown := sorted(set(examples or ()) - set(found)):
        raise ConfigError(
            f"examples = {shown(unknown[0])}: is not among the tasks {', '.join(found)}; name one of them"
        )
    plans = []
    for name, task in found.items():
        path = Path(tasks[name]).expanduser()
        own = Path(examples[name]).expanduser() if examples and name in examples else None
        cases = make_cases(task, path, num_fewshot=num_fewshot, examples=own, seed=seed, limit=limit)
        num = task.default_num_fewshot if num_fewshot is None else num_fewshot
        plans.append(Plan(task, cases, num, seed, path.name))
    return plans
