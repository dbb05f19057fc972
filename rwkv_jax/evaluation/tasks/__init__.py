"""Evaluation tasks, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.evaluation.tasks.base import Task
from rwkv_jax.evaluation.tasks.piqa import Piqa

TASKS: Mapping[str, Task[Any]] = MappingProxyType({task.name: task for task in (Piqa(),)})
"""All tasks, with their default options; `dataclasses.replace` changes those."""


def find_task(name: str) -> Task[Any]:
    """A task by its name. Raises ConfigError, with the nearest names, if there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"tasks = {shown(name)}: no such task; {remedy}there are {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Task", "find_task"]
