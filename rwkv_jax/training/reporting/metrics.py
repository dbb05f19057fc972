"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rwkv_jax.atomic import replace_file
from rwkv_jax.checkpoint_files import writing
from rwkv_jax.config import ConfigError, LoggingConfig
from rwkv_jax.file_kinds import METRICS_FILE as METRICS_FILE

WANDB_ID_FILE = "wandb_run_id"

Kind = Literal["data", "train", "evaluation", "task", "sample", "stop"]

Sink = tuple[Callable[[Kind, int, dict[str, Any]], None], Callable[[], None]]
"""A logger besides metrics.jsonl: a function that logs values of a kind at a step, and one that closes it."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in order; a last line that a killed run left half written is skipped.

    Raises FileNotFoundError if there is no such file, ValueError if a line before the last one is damaged.
    """
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record or "step" not in record:
                raise ValueError("no kind and step in it")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path.name}, line {number} is damaged: {error}") from error
        records.append(record)
    return records


def require_loggers(logging: LoggingConfig) -> None:
    """Check that every configured logger can be imported; cheap enough to run before anything else.

    Raises ConfigError with the field and the pip command.
    """
    if logging.tensorboard:
        _import_logger("tensorboardX", "SummaryWriter", field="logging.tensorboard", value=True, extra="tensorboard")
    if logging.wandb is not None:
        _import_logger("wandb", "init", field="logging.wandb", value=logging.wandb, extra="wandb")


class MetricsWriter:
    """Appends one JSON object per line to RUN_DIR/metrics.jsonl; a context manager.

    A run that resumes from a checkpoint passes its step as `resume_step`: lines after that step are dropped, so that
    the file ends up like that of an uninterrupted run, provided that everything about step k is written before the
    checkpoint of step k. `resume_step` 0 starts a new file.

    `config` is logged to Weights & Biases. Raises ConfigError if a logger is not installed.
    """

    def __init__(
        self,
        run_dir: Path | str,
        logging: LoggingConfig,
        resume_step: int = 0,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        require_loggers(logging)
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / METRICS_FILE
        with writing(self.path):
            _drop_after(self.path, resume_step)
            self._file = self.path.open("ab")
        self._sinks: list[Sink] = []
        if logging.tensorboard:
            self._sinks.append(_tensorboard(run_dir, resume_step))
        if logging.wandb is not None:
            self._sinks.append(_wandb(run_dir, logging.wandb, resume_step, config))

    def write(self, kind: Kind, step: int, values: Mapping[str, object]) -> None:
        """Record `values` at `step`: numbers, arrays of one element, strings, or lists and dicts of them.

        A number that is not finite becomes null. Raises TypeError for anything that JSON cannot represent.
        """
        plain = {name: _plain(name, value) for name, value in values.items() if name not in ("kind", "step")}
        line = json.dumps({"kind": kind, "step": step, **plain}, ensure_ascii=False, allow_nan=False)
        # A lone surrogate, which a sample may contain, has no UTF-8; its backslash escape happens to be valid JSON.
        with writing(self.path):
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
        for log, _ in self._sinks:
            log(kind, step, plain)

    def close(self) -> None:
        """Close the file and every logger; a second call does nothing."""
        self._file.close()
        while self._sinks:
            _, finish = self._sinks.pop()
            finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(name: str, value: object) -> Any:
    """Converts `value` for `json`; arrays of one element become numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", 1) == 1:
        return _plain(name, item())
    raise TypeError(f"metric {name!r} is a {type(value).__name__}; give a number, a string or a list or dict of them")


def last_stop(run_dir: Path) -> dict[str, Any] | None:
    """The record with which a run gave up: `step`, and `first`, the first of the steps that were skipped."""
    path = run_dir / METRICS_FILE
    stops = [record for record in _records(path) if record["kind"] == "stop"] if path.exists() else []
    return stops[-1] if stops and isinstance(stops[-1].get("first"), int) else None


def refuse_lost_checkpoints(run_dir: Path, checkpoints: Path, first_step: int, every: int) -> None:
    """Raises ConfigError if nothing is where a run has saved checkpoints, not even a save that was cut short.

    Args:
      checkpoints: the folder, before anything cleans it up.
      first_step: after which the run began.
      every: steps between checkpoints.
    """
    path = run_dir / METRICS_FILE
    if not path.exists() or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        return
    taken = [record["step"] for record in _records(path) if record.get("loss") is not None]
    if taken and max(taken) > (first_step // every + 1) * every:
        raise ConfigError(
            f"{run_dir}: has no checkpoint, but {METRICS_FILE} goes to step {max(taken)}, and one was due each {every} "
            "steps; put the checkpoints back (is a disk not mounted?), or begin again with --restart"
        )


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); mend the file, or move it away") from error


def _drop_after(path: Path, resume_step: int) -> None:
    """Rewrite `path` without the lines after `resume_step`, atomically."""
    if not path.exists():
        return
    kept = [record for record in _records(path) if record["step"] <= resume_step] if resume_step > 0 else []
    lines = [json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for record in kept]
    replace_file(path, b"".join(lines))


def _import_logger(module_name: str, entry: str, *, field: str, value: object, extra: str) -> ModuleType:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = str(error)
    else:
        # A folder of the same name in the working directory, such as wandb's own, imports as an empty package.
        if hasattr(module, entry):
            return module
        reason = f"something else named {module_name} is found first"
    raise ConfigError(
        f'{field} = {value!r}: {module_name} cannot be imported ({reason}); run  pip install "rwkv-jax[{extra}]"  '
        "or leave this setting out"
    )


def _tensorboard(run_dir: Path, resume_step: int) -> Sink:
    module = importlib.import_module("tensorboardX")
    # TensorBoard discards the events of an interrupted run from `purge_step` on.
    writer = module.SummaryWriter(logdir=str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(kind: Kind, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                # Rendered as Markdown: four spaces make a code block, which keeps line breaks and characters.
                writer.add_text(f"{kind}/{name}", "    " + value.replace("\n", "\n    "), step)
            elif isinstance(value, int | float):
                writer.add_scalar(f"{kind}/{name}", value, step)

    return log, writer.close


def _wandb(run_dir: Path, project: str, resume_step: int, config: Mapping[str, Any] | None) -> Sink:
    module = importlib.import_module("wandb")
    id_file = run_dir / WANDB_ID_FILE
    run_id = id_file.read_text(encoding="utf-8").strip() if resume_step > 0 and id_file.exists() else None
    run = module.init(
        project=project,
        dir=str(run_dir),
        id=run_id,
        resume="allow" if run_id else None,
        config=dict(config) if config is not None else None,
    )
    replace_file(id_file, run.id.encode())

    def log(kind: Kind, step: int, values: dict[str, Any]) -> None:
        # The server rejects steps that an interrupted run has already sent; their values are the same.
        run.log({f"{kind}/{name}": value for name, value in values.items() if value is not None}, step=step)

    return log, run.finish
