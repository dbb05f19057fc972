"""Which implementation of the WKV operator a run's steps take, where its config leaves that open.

A new run on a GPU or TPU takes the fastest by measurement, and records it. A resumed run takes what is recorded, so
that it ends with the bits of one that was not stopped.
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
from rwkv_jax.parallel.coordination import allgather_text
from rwkv_jax.parallel.mesh import MeshShape, mesh_shape
from rwkv_jax.parallel.processes import Processes
from rwkv_kernels import dispatch
from rwkv_kernels.autotune import Tuning, Workload

FIELD = "wkv_implementation"
"""Name of the choice in run.json."""

_MAX_SECONDS = 24 * 3600  # that the other processes wait


def choose_operator(
    config: TrainConfig,
    mesh: Mesh | None,
    saved_run: Mapping[str, Any] | None,
    processes: Processes,
    report: Callable[[str], None],
) -> dict[str, str]:
    """What is recorded of a run beside its config: `FIELD` and the name of the implementation, or nothing.

    The first process looks it up or measures it, and tells the others.

    Args:
      saved_run: the content of run.json; None for a new run.
      report: for a line that says what was found.

    Raises:
      ConfigError: the recorded implementation cannot run here, or none gives right results.
    """
    choices: dict[str, str] = {}
    if processes.is_first:
        if saved_run is not None:
            choices = dict(saved_run.get("choices", {}))
            _check_recorded(config, mesh, choices, report)
        else:
            choices = _choose(config, mesh, report)
    return json.loads(allgather_text(processes, "the operator", json.dumps(choices), seconds=_MAX_SECONDS)[0])


def with_choices(config: TrainConfig, choices: Mapping[str, str]) -> TrainConfig:
    """The config with what is recorded in place of what it leaves open."""
    if config.model.wkv_implementation is not None or FIELD not in choices:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, wkv_implementation=choices[FIELD]))


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


def _check_recorded(
    config: TrainConfig, mesh: Mesh | None, choices: Mapping[str, str], report: Callable[[str], None]
) -> None:
    workload, recorded = _workload(config, mesh), choices.get(FIELD)
    if recorded is None or workload is None or config.model.wkv_implementation is not None:
        return
    implementation = rwkv_kernels.OPERATORS[workload.operator].implementations.get(recorded)
    refusal = (
        "this version has none of that name" if implementation is None else implementation.refuses(workload.problem)
    )
    if refusal is not None:
        raise ConfigError(
            f"model.wkv_implementation = None: {config.run_dir} has taken its steps with {recorded!r}, by measurement, "
            f"which cannot run here: {refusal}; resume it where it ran, or name {_by_table(workload)!r}, which rounds "
            "differently"
        )
    report(f"operator: {workload.operator} by {recorded}, as {config.run_dir} has taken its steps so far")


def _choose(config: TrainConfig, mesh: Mesh | None, report: Callable[[str], None]) -> dict[str, str]:
    workload, setting = _workload(config, mesh), config.training.tune
    if workload is None or config.model.wkv_implementation is not None:
        return {}
    on_accelerator = workload.problem.platform != "cpu"
    if setting == "never" or (setting == "auto" and not on_accelerator):
        if on_accelerator:
            report(
                f"operator: {workload.operator} by {_by_table(workload)}, by the table, not measured on this device "
                "(training.tune = never)"
            )
        return {}
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
    operator = rwkv_kernels.OPERATORS[workload.operator]
    preferred = operator.preferred(workload.problem)
    return dispatch.explain(operator.name, operator.implementations, preferred, workload.problem).chosen
