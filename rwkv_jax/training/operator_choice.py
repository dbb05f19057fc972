"""Which implementation of the WKV operator a run's steps take, where its config leaves that open.

A new run on a GPU or TPU takes the fastest by measurement. Every start records what it takes; a resumed run takes what
is recorded, so that it ends with the bits of one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

import rwkv_kernels
from rwkv_jax import autotune
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.models.implementations import refuse_unable
from rwkv_jax.parallel.coordination import allgather_text
from rwkv_jax.parallel.mesh import MeshShape, mesh_shape
from rwkv_jax.parallel.processes import Processes
from rwkv_kernels.autotune import Tuning, Workload

FIELD = "wkv_implementation"
"""Name of the choice in run.json."""

SOURCE = "wkv_implementation_by"
"""Name in run.json of where the choice is from; `TABLE`, or absent for what was measured or named."""

TABLE = "table"

_MAX_SECONDS = 24 * 3600  # that the other processes wait


def choose_operator(
    config: TrainConfig,
    mesh: Mesh | None,
    saved_run: Mapping[str, Any] | None,
    processes: Processes,
    report: Callable[[str], None],
) -> dict[str, str]:
    """What is recorded of a run beside its config: `FIELD` and the name of the implementation, with `SOURCE`.

    Nothing for a model without an operator. The first process looks it up or measures it, and tells the others.

    Args:
      saved_run: the content of run.json; None for a new run.
      report: for a line that says what was found.

    Raises:
      ConfigError: the recorded implementation cannot run here, or none gives right results.
    """
    choices: dict[str, str] = {}
    if processes.is_first:
        if saved_run is not None:
            choices = _choose_again(config, mesh, saved_run, report)
        else:
            choices = _choose(config, mesh, report)
    return json.loads(allgather_text(processes, "the operator", json.dumps(choices), seconds=_MAX_SECONDS)[0])


def with_choices(config: TrainConfig, choices: Mapping[str, str]) -> TrainConfig:
    """The config with what is recorded in place of what it leaves open; what the table takes anyway stays open."""
    if config.model.wkv_implementation is not None or FIELD not in choices or choices.get(SOURCE) == TABLE:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, wkv_implementation=choices[FIELD]))


def naming_operator(step: Callable[..., Any], choices: Mapping[str, str]) -> Callable[..., Any]:
    """A step whose failure names what it takes by measurement or by name, which may not fit beside the model."""

    def run(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:
            if FIELD in choices and SOURCE not in choices:
                error.add_note(
                    f"the step takes the operator by {choices[FIELD]!r}; --model.wkv-implementation NAME takes another "
                    "one, which rounds differently"
                )
            raise

    return run


def refuse_unable_here(config: TrainConfig, mesh: Mesh | None) -> None:
    """Refuses a named implementation that cannot run on this machine; it would fail only while the step is traced.

    Raises:
      ConfigError: with the reason, and the implementations that can.
    """
    workload = _workload(config, mesh)
    if workload is not None:
        refuse_unable(config.model, workload.problem, "this machine")


def run_workload(config: TrainConfig, shape: MeshShape) -> Workload | None:
    """The operator's calls in a step of a run, as each device makes them; None without an operator."""
    training = config.training
    return autotune.training_workload(
        config.model,
        training.batch_size // training.accumulation_steps // (shape.data * shape.fsdp),
        training.sequence_length // shape.sequence,
        tensor=shape.tensor,
        packed=training.reset_at_documents,
    )


def _workload(config: TrainConfig, mesh: Mesh | None) -> Workload | None:
    return run_workload(config, MeshShape() if mesh is None else mesh_shape(mesh))


def _choose_again(
    config: TrainConfig, mesh: Mesh | None, saved_run: Mapping[str, Any], report: Callable[[str], None]
) -> dict[str, str]:
    """What a resumed run takes: what is named now, else what its last steps took."""
    workload, named = _workload(config, mesh), config.model.wkv_implementation
    if workload is None:
        return {}
    choices = saved_run.get("choices", {})
    # The config first: earlier versions recorded only what was measured, and kept that when another was named.
    last = saved_run.get("config", {}).get("model", {}).get(FIELD) or choices.get(FIELD)
    if named is not None:
        if last not in (None, named):
            report(
                f"operator: {workload.operator} by {named}, as named; {config.run_dir} took its last steps with "
                f"{last}, which rounds differently"
            )
        return {FIELD: named}
    by_table = _by_table(workload)
    if last is None or (last == by_table and choices.get(SOURCE) == TABLE):
        return {FIELD: by_table, SOURCE: TABLE}
    implementation = rwkv_kernels.OPERATORS[workload.operator].implementations.get(last)
    refusal = (
        "this version has none of that name" if implementation is None else implementation.refuses(workload.problem)
    )
    if refusal is not None:
        raise ConfigError(
            f"model.wkv_implementation = None: {config.run_dir} took its last steps with {last!r}, which cannot run "
            f"here: {refusal}; resume it where it ran, or name {by_table!r}, which rounds differently"
        )
    report(f"operator: {workload.operator} by {last}, as {config.run_dir} took its last steps")
    return {FIELD: last}


def _choose(config: TrainConfig, mesh: Mesh | None, report: Callable[[str], None]) -> dict[str, str]:
    workload, named, setting = _workload(config, mesh), config.model.wkv_implementation, config.training.tune
    if workload is None:
        return {}
    if named is not None:
        return {FIELD: named}
    on_accelerator = workload.problem.platform != "cpu"
    measures = setting == "always" or (setting == "auto" and on_accelerator)
    num_parts = 1 if mesh is None else mesh_shape(mesh).sequence
    if not measures or num_parts > 1:
        if measures or on_accelerator:
            reason = (
                f"on a mesh that splits time (parallel.sequence = {num_parts})"
                if num_parts > 1
                else "on this device (training.tune = never)"
            )
            report(f"operator: {workload.operator} by {_by_table(workload)}, by the table, not measured {reason}")
        return {FIELD: _by_table(workload), SOURCE: TABLE}
    tuning, source = _look_up_or_measure(workload, report)
    if tuning.chosen is None:
        raise ConfigError(
            f"model.wkv_implementation = None: no implementation gives right results on this device; see rwkv doctor, "
            f"and report\n{tuning}"
        )
    report(found_line(tuning, source))
    return {FIELD: tuning.chosen}


def _look_up_or_measure(workload: Workload, report: Callable[[str], None]) -> tuple[Tuning, str]:
    """A measurement, and where it is from; a file that cannot be used is named, and left as it is."""
    path = autotune.default_path()
    try:
        if (found := autotune.find(path, workload)) is not None:
            return found, f"measured before, in {path}"
    except autotune.TuningFileError as error:
        report(f"not used: {error}")
    report(f"measuring the implementations of {workload}: once, for up to some minutes")
    tuning = autotune.measure(workload)
    if not tuning.is_lasting:
        return tuning, "measured now, and not kept: memory was out, or the device failed"
    try:
        autotune.keep(path, tuning)
    except autotune.TuningFileError:
        return tuning, "measured now, and kept nowhere"
    except OSError as error:
        return tuning, f"measured now; {path} cannot be written ({error.strerror})"
    return tuning, f"measured now, kept in {path}"


def found_line(tuning: Tuning, source: str) -> str:
    """One line: what is taken, how long it takes, and what became of the others."""
    times = {trial.name: 1e3 * trial.seconds for trial in tuning.trials if trial.seconds is not None}
    others = [f"{name} {time:.3f}" for name, time in times.items() if name != tuning.chosen]
    others += [
        f"{trial.name} {trial.failure}"
        for trial in tuning.trials
        if trial.failure is not None and not trial.failure.startswith("cannot: ")
    ]
    rest = f" ({', '.join(others)})" if others else ""
    operator, chosen = tuning.workload.operator, tuning.chosen or ""
    return f"operator: {operator} by {chosen}, {times[chosen]:.3f} ms a call{rest}; {source}"


def _by_table(workload: Workload) -> str:
    problem = workload.problem
    explanation = rwkv_kernels.explain(
        workload.operator, problem.shape, problem.dtype, problem.platform, problem.device_kind
    )
    return explanation.chosen
