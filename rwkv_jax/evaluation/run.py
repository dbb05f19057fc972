"""Evaluates a model on tasks, item by item, so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.evaluation.engine_scorer import EngineScorer
from rwkv_jax.evaluation.journal import FOLDER, Journal, check_folder, hash_requests, lock_folder, refuse_other
from rwkv_jax.evaluation.report import (
    RESULTS,
    Report,
    TaskReport,
    describe_model,
    machine,
    read_report,
    shared_settings,
    versions,
    write_report,
)
from rwkv_jax.evaluation.requests import answer
from rwkv_jax.evaluation.tasks.plans import Plan, plan_tasks
from rwkv_jax.inference.engine.engine import Engine


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where an evaluation is."""

    task: str
    num_done: int
    """Items, those of an earlier run included."""
    num_items: int


def evaluate(
    engine: Engine,
    tasks: Mapping[str, str | Path] | Sequence[Plan],
    *,
    output: str | Path | None = None,
    begin: bool = True,
    window: int | None = None,
    name: str = "",
    report: Callable[[Progress], None] | None = None,
    **choices: Any,
) -> Report:
    """How good a model is at tasks.

    Args:
      tasks: a file or folder for each name, or what `plan_tasks` made of them.
      output: folder for results.json, results.md and results.png, and for the results of items while it runs: called
        again with the same folder, an interrupted evaluation goes on, and tasks that were finished there before stay in
        the report, behind these. None writes nothing.
      begin, window: as in `EngineScorer`.
      name: of the model, for the report.
      report: called whenever items are done.
      choices: of `plan_tasks`: num_fewshot, examples, limit, seed; not beside plans, which have theirs.

    Raises:
      ConfigError: as `plan_tasks` and `EngineScorer`; or the folder holds results of another model, prompt or setting.
        Nothing has been run then.
    """
    plans = plan_tasks(tasks, **choices) if isinstance(tasks, Mapping) else list(tasks)
    if not isinstance(tasks, Mapping) and choices:
        choice, value = next(iter(choices.items()))
        raise ConfigError(f"{choice} = {shown(value)}: the tasks are planned already; give it to plan_tasks")
    folder = None if output is None else Path(output).expanduser()
    scorer = EngineScorer(engine, begin=begin, window=window)
    about: dict[str, Any] = {
        "model": {"name": name, **describe_model(engine)},
        "settings": {"begin": begin, "window": scorer.window},
        "versions": versions(),
        "machine": machine(),
    }
    settings = {plan.task.name: {**_settings(plan), **shared_settings(about)} for plan in plans}
    start = time.perf_counter()
    with contextlib.ExitStack() as opened:
        journals: list[Journal | None] = [None] * len(plans)
        earlier: list[TaskReport] = []
        if folder is not None:
            opened.enter_context(lock_folder(folder))
            check_folder(folder, settings, shared_settings(about))
            if (folder / RESULTS).exists():
                there, earlier = read_report(folder / RESULTS, without=settings)
                refuse_other(folder / RESULTS, there, shared_settings(about))
            for i, plan in enumerate(plans):
                path = folder / FOLDER / f"{plan.task.name}.jsonl"
                journals[i] = opened.enter_context(
                    contextlib.closing(Journal(path, settings[plan.task.name], _prompts(plan)))
                )
        done = [_evaluate(scorer, plan, journal, report) for plan, journal in zip(plans, journals, strict=True)]
        result = Report(**about, tasks=(*done, *earlier), seconds=time.perf_counter() - start)
        if folder is not None:
            write_report(result, folder)
    return result


def _settings(plan: Plan) -> dict[str, Any]:
    """What the results of a task's items depend on besides `shared_settings`, and the prompts, which are compared item
    by item."""
    return {
        "task": plan.task.name,
        "task_version": plan.task.version,
        "num_fewshot": plan.num_fewshot,
        "seed": plan.seed,
    }


def _evaluate(
    scorer: EngineScorer, plan: Plan, journal: Journal | None, report: Callable[[Progress], None] | None
) -> TaskReport:
    """One task; items that are in the journal are not asked again."""
    start = time.perf_counter()
    results: dict[int, list[Any]] = {} if journal is None else dict(journal.results)
    num_truncated = {} if journal is None else dict(journal.num_truncated)
    num_resumed = len(results)
    todo = [case for case in plan.cases if case.index not in results]
    asked = [(case, place) for case in todo for place in range(len(case.requests))]
    pending = {case.index: [None] * len(case.requests) for case in todo}
    left = {case.index: len(case.requests) for case in todo}

    def tell() -> None:
        if report is not None:
            report(Progress(plan.task.name, len(results), len(plan.cases)))

    def take(number: int, result: Any) -> None:
        case, place = asked[number]
        pending[case.index][place] = result
        left[case.index] -= 1
        if left[case.index] == 0:
            results[case.index] = pending.pop(case.index)
            num_truncated[case.index] = sum(map(scorer.is_truncated, case.requests))
            if journal is not None:
                journal.add(case.index, results[case.index], num_truncated[case.index])
            tell()

    tell()
    answer(scorer, [request for case in todo for request in case.requests], report=take)
    scores = [plan.task.score(case.item, results[case.index]) for case in plan.cases]
    return TaskReport(
        task=plan.task,
        summary=plan.task.aggregate(scores, [case.group for case in plan.cases]),
        num_items=len(plan.cases),
        num_requests=sum(len(case.requests) for case in plan.cases),
        num_resumed=num_resumed,
        num_truncated=sum(num_truncated.values()),
        num_fewshot=plan.num_fewshot,
        seed=plan.seed,
        file=plan.file,
        prompt_hash=_digest("".join(_prompts(plan).values())),
        answer_hash=_digest("".join(repr(case.item) for case in plan.cases)),
        seconds=time.perf_counter() - start,
    )


def _prompts(plan: Plan) -> dict[int, str]:
    """For each item the hash of what is asked about it."""
    return {case.index: hash_requests(case.requests) for case in plan.cases}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
