"""What an evaluation has found: JSON with all that it depends on, a table in Markdown, a picture."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

import rwkv_jax
from rwkv_jax.atomic import replace_file
from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.evaluation.tasks import find_task
from rwkv_jax.evaluation.tasks.base import Summary, Task
from rwkv_jax.figures import encoded, new_figure
from rwkv_jax.host import processor
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.json_object import parse_object

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS, TABLE, PICTURE = "results.json", "results.md", "results.png"
"""Names of the files in an evaluation's folder."""

FORMAT = "rwkv-jax evaluation report 2"

_FIELDS = (
    "num_items",
    "num_requests",
    "num_resumed",
    "num_truncated",
    "num_fewshot",
    "seed",
    "file",
    "prompt_hash",
    "answer_hash",
)  # of a task's report that are plain data

_COLOR, _GRID = "#1f5fa8", "#d9d9d9"
_LOG_RANGE = 30  # ratio of values from which an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """What was found on one task."""

    task: Task[Any]
    summary: Summary
    num_items: int
    num_requests: int
    num_resumed: int
    """Items whose results were taken from an earlier run."""
    num_truncated: int
    """Contexts whose beginning was left out; always 0 for models whose state has no limit."""
    num_fewshot: int
    seed: int
    """Of the choice of examples."""
    file: str
    """Name of the task's file or folder."""
    prompt_hash: str
    """SHA-256 of all that was asked, in hex."""
    answer_hash: str
    """SHA-256 of the items with their answers."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are text, which JSON lacks."""
        metrics = self.task.metrics
        return {
            "task": self.task.name,
            "task_version": self.task.version,
            "source": self.task.source,
            **{field: getattr(self, field) for field in _FIELDS},
            "seconds": round(self.seconds, 3),
            "metrics": {
                name: {
                    **_plain(found),
                    "higher_is_better": metrics[name].higher_is_better,
                    "unit": metrics[name].unit,
                }
                for name, found in self.summary.metrics.items()
            },
            "groups": {
                group: {name: _plain(found) for name, found in own.items()}
                for group, own in self.summary.groups.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TaskReport:
        """What `as_json` wrote. Raises KeyError, TypeError or ValueError if it did not, or if the task has changed."""
        task = find_task(content["task"])
        if content["task_version"] != task.version:
            raise ValueError(f"{task.name} has version {task.version} now and was {content['task_version']}")
        summary = Summary(
            _metrics(task, content["metrics"]),
            {group: _metrics(task, own) for group, own in content["groups"].items()},
        )
        return cls(task=task, summary=summary, seconds=content["seconds"], **{name: content[name] for name in _FIELDS})


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found on all tasks, and of what and with what."""

    model: dict[str, Any]
    """As `describe_model`."""
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    tasks: tuple[TaskReport, ...]
    seconds: float
    """Of the last evaluation, which need not be that of all tasks."""

    @property
    def num_truncated(self) -> int:
        """Contexts whose beginning was left out, of all tasks."""
        return sum(task.num_truncated for task in self.tasks)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": FORMAT,
            "model": self.model,
            "settings": self.settings,
            "versions": self.versions,
            "machine": self.machine,
            "num_truncated": self.num_truncated,
            "seconds": round(self.seconds, 3),
            "tasks": [task.as_json() for task in self.tasks],
        }

    def markdown(self) -> str:
        """A table of all metrics, what was cut, and a table for the groups of each task that has any."""
        lines = [
            "| task | version | examples | items | metric | value | standard error | 95% interval |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for task in self.tasks:
            first = [task.task.name, str(task.task.version), str(task.num_fewshot), str(task.num_items)]
            for name, found in task.summary.metrics.items():
                lines.append(_row([*first, _with_unit(task.task, name), *_cells(found)]))
                first = [""] * len(first)
        for task in self.tasks:
            if task.num_truncated:
                cut = f"{task.num_truncated} of {task.num_requests} requests were cut at their beginning"
                lines += ["", f"{task.task.name}: {cut}, since the model's context cannot hold them."]
        for task in self.tasks:
            if task.summary.groups:
                lines += ["", f"{task.task.name} by group", ""]
                lines += [
                    "| group | items | metric | value | standard error | 95% interval |",
                    "|---|---|---|---|---|---|",
                ]
                for group, metrics in task.summary.groups.items():
                    for name, found in metrics.items():
                        lines.append(_row([group, str(found.count), _with_unit(task.task, name), *_cells(found)]))
        return "\n".join(lines) + "\n"


def describe_model(engine: Engine) -> dict[str, Any]:
    """The model and its tokenizer; the hash covers every parameter, in its dtype or packed.

    That of the tuned state in which texts begin is there if there is one.
    """
    config, digest = engine.config, engine.initial_state_digest
    return {
        "hash": engine.identity.model,
        "kind": config.title,
        "num_layers": config.num_layers,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "num_parameters": config.num_parameters(),
        "dtype": config.dtype,
        "parameter_dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(engine.model, nnx.Param))}),
        "tokenizer": engine.identity.tokenizer,
        **({} if digest is None else {"initial_state": digest}),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    names = ("jax", "jaxlib", "flax", "numpy")
    installed = {name: importlib.metadata.version(name) for name in names}
    return {"rwkv-jax": rwkv_jax.__version__, "python": platform.python_version(), **installed}


def machine() -> dict[str, Any]:
    """What computes; no names of hosts, no paths."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "processor": processor(),
        "num_cores": os.cpu_count(),
    }


def shared_settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """What all results in a folder must have in common, of what a report says of the whole."""
    model, settings = about["model"], about["settings"]
    return {
        "begin": settings["begin"],
        "window": settings["window"],
        "model": f"state {model['initial_state']} of {model['hash']}" if "initial_state" in model else model["hash"],
        "dtype": model["dtype"],
        "tokenizer": model["tokenizer"],
        "versions": {name: about["versions"][name] for name in ("rwkv-jax", "jax")},
        "platform": about["machine"]["platform"],
    }


def read_report(path: Path, without: Collection[str] = ()) -> tuple[dict[str, Any], list[TaskReport]]:
    """The `shared_settings` of a results.json, and its tasks, but for those that are named.

    Raises:
      ConfigError: it cannot be read, is damaged or of another version.
    """
    remedy = f"name another folder, or move {path} away"
    try:
        content = parse_object(path.read_bytes(), path, remedy=remedy)
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be read ({error.strerror}); name another folder") from error
    if content.get("format") != FORMAT:
        raise ConfigError(f"output: {path} is no report of this version; {remedy}")
    try:
        tasks = [TaskReport.from_json(each) for each in content["tasks"] if each["task"] not in without]
        return shared_settings(content), tasks
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"output: {path} cannot be gone on with ({error}); {remedy}") from error


def write_report(report: Report, folder: Path) -> None:
    """Writes or replaces results.json, results.md and results.png."""
    text = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(folder / RESULTS, text.encode() + b"\n")
    replace_file(folder / TABLE, report.markdown().encode())
    replace_file(folder / PICTURE, picture(report.tasks))


def picture(tasks: Sequence[TaskReport]) -> bytes:
    """A PNG of all metrics with their 95% intervals: one axis for each unit, by which values compare."""
    rows: dict[str, list[tuple[str, Estimate]]] = {"": []}  # shares of items first
    for task in tasks:
        for name, found in task.summary.metrics.items():
            rows.setdefault(task.task.metrics[name].unit, []).append((f"{task.task.name}: {name}", found))
    rows = {unit: own for unit, own in rows.items() if own}
    heights = [len(own) + 1 for own in rows.values()]
    figure = new_figure(8, 0.6 + 0.4 * sum(heights))
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (unit, own) in zip(axes, rows.items(), strict=True):
        _draw(axis, unit, own)
    return encoded(figure)


def _draw(axis: Axes, unit: str, rows: Sequence[tuple[str, Estimate]]) -> None:
    for place, (_, found) in enumerate(rows):
        if not math.isfinite(found.value):
            axis.annotate(" infinite", (0, place), xycoords=("axes fraction", "data"), va="center")
            continue
        if found.low is not None and found.high is not None:
            axis.plot([found.low, found.high], [place, place], color=_COLOR, linewidth=2)
        axis.plot(found.value, place, "o", color=_COLOR)
        axis.annotate(f"{found.value:.4g}", (found.value, place), (0, 5), textcoords="offset points", ha="center")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.7)
    values = [found.value for _, found in rows if math.isfinite(found.value) and found.value > 0]
    if unit:
        axis.set_xlabel(unit)
        if values and max(values) / min(values) > _LOG_RANGE:
            axis.set_xscale("log")
    else:
        axis.set_xlabel("share of items, with its 95% interval")
        axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", color=_GRID)
    axis.set_axisbelow(True)


def _plain(found: Estimate) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found._asdict().items()
    }


def _metrics(task: Task[Any], content: Mapping[str, Any]) -> dict[str, Estimate]:
    """The inverse of `_plain` for all metrics of a task."""
    return {name: Estimate(*(_parsed(content[name][field]) for field in Estimate._fields)) for name in task.metrics}


def _parsed(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _with_unit(task: Task[Any], name: str) -> str:
    unit = task.metrics[name].unit
    return f"{name} ({unit})" if unit else name


def _cells(found: Estimate) -> list[str]:
    stderr = "" if found.stderr is None else f"± {_number(found.stderr)}"
    interval = "" if found.low is None or found.high is None else f"{_number(found.low)} to {_number(found.high)}"
    return [_number(found.value), stderr, interval]


def _number(value: float) -> str:
    """Four decimals, or four digits where they would show none."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
