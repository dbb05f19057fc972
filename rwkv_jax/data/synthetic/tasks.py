"""The table of synthetic tasks, and how a config names one: `synthetic:mqar(num_pairs=4)`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from rwkv_jax.checks import require_known, shown
from rwkv_jax.config import ConfigError
from rwkv_jax.config.data import SYNTHETIC
from rwkv_jax.config.dicts import dataclass_from_dict
from rwkv_jax.data.synthetic.facts import Facts
from rwkv_jax.data.synthetic.recall import MQAR, Induction, Lookup, Needle, Recall
from rwkv_jax.data.synthetic.sequences import Addition, Copying, Reversal, SelectiveCopying, Sorting
from rwkv_jax.data.synthetic.state_tracking import ModularAddition, Parity, WordProblem
from rwkv_jax.data.synthetic.task import Task

TASKS: Mapping[str, type[Task]] = {
    kind.name: kind
    for kind in (
        *(MQAR, Recall, Lookup, Induction, Needle, Facts),
        *(Copying, SelectiveCopying, Reversal, Sorting, Addition),
        *(Parity, ModularAddition, WordProblem),
    )
}
"""Every task by name."""


def parse_task(source: str) -> Task:
    """The task that `data.source` names.

    Raises:
      ConfigError: it is not `synthetic:NAME(field=value, ...)`, the task or a field is unknown, or a value invalid.
    """
    name, values = _parse(source)
    place = f"data.source = {shown(source)}: "
    require_known(name, TASKS, f"{place}task", "task")
    kind = TASKS[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    for field in values:
        require_known(field, fields, f"{place}field of {name}", "field")
    return dataclass_from_dict(kind, values, f"data.source, {name}.")


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    """Name and values; nothing is evaluated but literals."""
    wrong = ConfigError(
        f"data.source = {shown(source)}: write {SYNTHETIC}NAME, or {SYNTHETIC}NAME(field=value, ...) with numbers, "
        f"texts in quotes, True or False; names are {', '.join(TASKS)}"
    )
    try:
        found = ast.parse(source.removeprefix(SYNTHETIC).strip(), mode="eval").body
        if isinstance(found, ast.Name):
            return found.id, {}
        if not isinstance(found, ast.Call) or not isinstance(found.func, ast.Name) or found.args:
            raise wrong
        values: dict[str, Any] = {}
        for keyword in found.keywords:
            if keyword.arg is None or keyword.arg in values:
                raise wrong
            values[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise wrong from error
    return found.func.id, values
