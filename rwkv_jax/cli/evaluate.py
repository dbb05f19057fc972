"""`rwkv evaluate`: how good a model is at tasks whose files are at hand."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rwkv_jax.checks import ConfigError, require_whole
from rwkv_jax.cli.flags import TunedFlags, WeightsFlags

if TYPE_CHECKING:
    from rwkv_jax.evaluation.run import Progress

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on tasks in their own file formats; nothing is downloaded (docs/evaluation.md lists them)."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=PATH...")]
    """Each task with its file or folder, such as lambada=lambada_test.jsonl hellaswag=data/hellaswag."""
    tuned: Annotated[TunedFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TunedFlags)
    num_fewshot: int | None = None
    """Examples in each prompt; None takes each task's own default."""
    examples: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=PATH...]")] = ()
    """Files of the examples; without one they are drawn from the task's folder, or from the other items."""
    limit: int | None = None
    """Only the first items of each task; None takes all."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for results.json, results.md and results.png, and for the results of items meanwhile: the same command
    again goes on where it was interrupted. None only prints."""
    seed: int = 1234
    """Of the choice of examples; lm-eval's default."""
    begin: bool = True
    """Whether every prompt begins as texts do, World's with token 0, as in the official evaluations."""
    window: int | None = None
    """Tokens of a text that are read at a time where whole texts are scored, as lm-eval's max_length; None carries the
    state over all of it."""
    slots: int = 8
    """Texts on the device at once."""
    json: bool = False
    """Print JSON rather than a table."""
    tune: Literal["auto", "never"] = "auto"
    """auto takes what is fastest by measurement on this device, measured now if need be; never, the tables' choices."""

    def run(self) -> None:
        """Evaluates and prints what was found."""
        from rwkv_jax.evaluation.tasks.plans import plan_tasks

        for name, minimum in (("num_fewshot", 0), ("limit", 1), ("window", 1)):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, minimum)
        require_whole("slots", self.slots, 1)
        plans = plan_tasks(
            _paths("tasks", self.tasks),
            num_fewshot=self.num_fewshot,
            examples=_paths("examples", self.examples),
            limit=self.limit,
            seed=self.seed,
        )

        from rwkv_jax.evaluation.engine_scorer import options_for
        from rwkv_jax.evaluation.run import evaluate
        from rwkv_jax.inference.engine.engine import Engine

        tuned = self.tuned.arguments(self.weights)
        model, tokenizer = self.weights.load(self.tuned)
        options = options_for(model, self.slots, tune=self.tune)
        with Engine(model, tokenizer, options, **tuned) as engine:
            del model  # the engine has its own copy of the layers
            report = evaluate(
                engine,
                plans,
                output=self.output,
                begin=self.begin,
                window=self.window,
                name=Path(self.weights.source).name,
                report=_Lines().show,
            )
        print(
            json.dumps(report.as_json(), ensure_ascii=False) if self.json else report.markdown(), end="\n" * self.json
        )
        if self.output is not None:
            print(f"written to {self.output}", file=sys.stderr)


class _Lines:
    """Progress on standard error: a line when a task begins and ends, and every ten seconds."""

    def __init__(self) -> None:
        self._last = -_SECONDS_BETWEEN_LINES
        self._task = ""

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        is_new, is_last = progress.task != self._task, progress.num_done == progress.num_items
        if is_new or is_last or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last, self._task = now, progress.task
            print(f"{progress.task}: {progress.num_done} of {progress.num_items} items", file=sys.stderr, flush=True)


def _paths(field: str, pairs: tuple[str, ...]) -> dict[str, str]:
    """Paths by task. Raises ConfigError for what is no NAME=PATH, and for a task that is named twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not (name and sign and path):
            raise ConfigError(f"{field} = {pair!r}: must be NAME=PATH, such as lambada=lambada_test.jsonl")
        if name in found:
            raise ConfigError(f"{field} = {pair!r}: {name} is named twice; give it once, in one command")
        found[name] = path
    return found
