"""Which implementation a run's steps take, and that a resumed run takes the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from rwkv_jax import autotune
from rwkv_jax.config import ConfigError, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.parallel.mesh import AXES, MeshShape, mesh_from_shape
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training import loop
from rwkv_jax.training.operator_choice import choose_operator, naming_operator, run_workload, with_choices
from rwkv_kernels import dispatch
from rwkv_kernels.autotune import Trial, Tuning, Workload
from tests.small_runs import assert_same_bits
from tests.train.in_process import Run, restore, run

CONFIG = TrainConfig(run_dir="runs/mine", training=StepConfig(batch_size=4, sequence_length=32))
H100 = "NVIDIA H100 80GB HBM3"
BY_TABLE = {"wkv_implementation": "chunked", "wkv_implementation_by": "table"}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of measurements."""
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """What has been measured; the scan is always found to be the fastest."""
    workloads: list[Workload] = []

    def measure(workload: Workload) -> Tuning:
        workloads.append(workload)
        failure = "WRONG: dk is off by 3e-01, at most 1e-04"
        trials = (
            Trial("scan", 1e-7, 1e-3, None),
            Trial("chunked", 1e-7, 4e-3, None),
            Trial("pallas_triton", 0.3, None, failure),
            Trial("pallas_mosaic_tpu", None, None, "cannot: it needs a TPU, and this is gpu"),
        )
        return Tuning(workload, trials)

    monkeypatch.setattr(autotune, "measure", measure)
    return workloads


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with a GPU says of itself."""
    monkeypatch.setattr(dispatch, "problem_here", lambda shape, dtype: dispatch.Problem("gpu", shape, dtype, H100))


def choose(config: TrainConfig = CONFIG, saved_run: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """What is recorded, and what is said."""
    lines: list[str] = []
    return choose_operator(config, None, saved_run, Processes(), lines.append), lines


def with_tune(setting: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, tune=setting))


# The choice of a new run


def test_on_a_gpu_a_new_run_measures_once(on_a_gpu: None, measured: list[Workload], path: Path) -> None:
    choices, lines = choose()
    assert choices == {"wkv_implementation": "scan"}
    assert [str(workload) for workload in measured] == [
        f"wkv7 B4 T32 H8 N64 M64 float32 on gpu ({H100}), float32 inputs, with gradients, packed"
    ]
    others = "chunked 4.000, pallas_triton WRONG: dk is off by 3e-01, at most 1e-04"
    found = f"operator: wkv7 by scan, 1.000 ms a call ({others})"
    assert lines == [
        f"measuring the implementations of {measured[0]}: once, for up to some minutes",
        f"{found}; measured now, kept in {path}",
    ]
    assert choose() == (choices, [f"{found}; measured before, in {path}"])
    assert len(measured) == 1


def test_on_a_cpu_only_who_asks_measures(measured: list[Workload], path: Path) -> None:
    assert choose() == choose(with_tune("never")) == (BY_TABLE, [])
    assert not measured
    assert not path.exists()
    assert choose(with_tune("always"))[0] == {"wkv_implementation": "scan"}
    assert len(measured) == 1


def test_on_a_gpu_that_measures_nothing_the_tables_choice_is_said(on_a_gpu: None, measured: list[Workload]) -> None:
    assert choose(with_tune("never")) == (
        BY_TABLE,
        ["operator: wkv7 by chunked, by the table, not measured on this device (training.tune = never)"],
    )
    assert not measured


@pytest.mark.parametrize(
    ("model", "choices"),
    [
        (ModelConfig(wkv_implementation="chunked"), {"wkv_implementation": "chunked"}),
        (ModelConfig(architecture="transformer"), {}),
    ],
)
def test_where_nothing_is_open_nothing_is_measured(
    on_a_gpu: None, measured: list[Workload], model: ModelConfig, choices: dict[str, str]
) -> None:
    assert choose(dataclasses.replace(CONFIG, model=model)) == (choices, [])
    assert not measured


def test_a_damaged_file_is_named_and_left_as_it_is(on_a_gpu: None, measured: list[Workload], path: Path) -> None:
    path.write_text("{}")
    choices, lines = choose()
    assert choices == {"wkv_implementation": "scan"}
    assert lines[0].startswith(f"not used: {path}: is no file of measurements of this version")
    assert lines[-1].endswith("; measured now, and kept nowhere")
    assert path.read_text() == "{}"


def test_a_folder_that_cannot_be_written_is_said(
    on_a_gpu: None, measured: list[Workload], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(autotune, "keep", keep)
    choices, lines = choose()
    assert choices == {"wkv_implementation": "scan"}
    assert lines[-1].endswith(f"; measured now; {path} cannot be written (Read-only file system)")


def test_what_does_not_last_is_not_kept(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    trials = (Trial("scan", 1e-7, 1e-3, None), Trial("chunked", None, None, "fails: RESOURCE_EXHAUSTED"))
    monkeypatch.setattr(autotune, "measure", lambda workload: Tuning(workload, trials, is_lasting=False))
    choices, lines = choose()
    assert choices == {"wkv_implementation": "scan"}
    assert lines[-1].endswith("; measured now, and not kept: memory was out, or the device failed")
    assert not path.exists()


def test_where_all_are_wrong_the_run_is_refused(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Trial("scan", 0.5, None, "WRONG: y is off by 5e-01, at most 1e-04")
    monkeypatch.setattr(autotune, "measure", lambda workload: Tuning(workload, (wrong,)))
    with pytest.raises(ConfigError, match=r"(?s)no implementation gives right results on this device.*scan .*WRONG: y"):
        choose()


def test_devices_of_a_mesh_have_their_share() -> None:
    training = dataclasses.replace(CONFIG.training, batch_size=32, accumulation_steps=2, reset_at_documents=False)
    workload = run_workload(dataclasses.replace(CONFIG, training=training), MeshShape(2, 4, 2, 8))
    assert workload is not None
    assert workload.problem.shape == (2, 16, 1, 64, 64)
    assert not workload.packed
    mesh = mesh_from_shape(MeshShape(), jax.devices()[:1])
    assert choose_operator(CONFIG, mesh, None, Processes(), pytest.fail) == BY_TABLE


def test_on_a_mesh_that_splits_time_nothing_is_measured(measured: list[Workload]) -> None:
    """There the operator computes in float32, and twice, which is another problem."""
    mesh = AbstractMesh((1, 1, 2, 1), AXES)
    lines: list[str] = []
    assert choose_operator(with_tune("always"), mesh, None, Processes(), lines.append) == BY_TABLE  # pyright: ignore[reportArgumentType]
    assert lines == [
        "operator: wkv7 by chunked, by the table, not measured on a mesh that splits time (parallel.sequence = 2)"
    ]
    assert not measured


# What is recorded

RECORDED = {"choices": {"wkv_implementation": "pallas_triton"}}


def test_a_resumed_run_takes_what_is_recorded(on_a_gpu: None, measured: list[Workload]) -> None:
    choices, lines = choose(with_tune("always"), RECORDED)
    assert choices == RECORDED["choices"]
    assert lines == ["operator: wkv7 by pallas_triton, as runs/mine took its last steps"]
    assert with_choices(CONFIG, choices).model.wkv_implementation == "pallas_triton"
    assert choose(with_tune("always"), {}) == (BY_TABLE, [])  # a run from before anything was recorded
    assert choose(with_tune("always"), {"choices": BY_TABLE}) == (BY_TABLE, [])
    assert with_choices(CONFIG, BY_TABLE) == CONFIG
    assert not measured


def test_a_table_that_has_changed_leaves_a_run_with_what_it_took() -> None:
    choices, lines = choose(saved_run={"choices": {"wkv_implementation": "scan", "wkv_implementation_by": "table"}})
    assert choices == {"wkv_implementation": "scan"}
    assert lines == ["operator: wkv7 by scan, as runs/mine took its last steps"]
    assert with_choices(CONFIG, choices).model.wkv_implementation == "scan"


@pytest.mark.parametrize("choices", [{}, {"wkv_implementation": "chunked"}])  # as earlier versions wrote them
def test_what_was_named_last_is_taken_when_it_is_not_named_again(choices: dict[str, str]) -> None:
    saved_run = {"config": {"model": {"wkv_implementation": "scan"}}, "choices": choices}
    taken, lines = choose(saved_run=saved_run)
    assert taken == {"wkv_implementation": "scan"}
    assert lines == ["operator: wkv7 by scan, as runs/mine took its last steps"]


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ("pallas_triton", "it needs an NVIDIA GPU, and this is cpu"),
        ("pallas_gone", "this version has none of that name"),
    ],
)
def test_what_is_recorded_but_cannot_run_is_refused(recorded: str, reason: str) -> None:
    saved_run = {"choices": {"wkv_implementation": recorded}}
    message = (
        f"model.wkv_implementation = None: runs/mine took its last steps with '{recorded}', which "
        f"cannot run here: {reason}; resume it where it ran, or name 'chunked', which rounds differently"
    )
    with pytest.raises(ConfigError) as error:
        choose(saved_run=saved_run)
    assert str(error.value) == message
    # Who names one goes on with it, is told, and has it recorded.
    named = dataclasses.replace(CONFIG, model=ModelConfig(wkv_implementation="scan"))
    choices, lines = choose(named, saved_run)
    assert choices == {"wkv_implementation": "scan"}
    assert lines == [
        f"operator: wkv7 by scan, as named; runs/mine took its last steps with {recorded}, which rounds differently"
    ]
    assert with_choices(named, choices) == named
    assert choose(named, {"choices": choices}) == (choices, [])


def test_a_step_that_fails_names_what_it_takes() -> None:
    def step(state: int) -> int:
        if state:
            raise MemoryError("out of it")
        return 7

    assert naming_operator(step, RECORDED["choices"])(0) == 7
    with pytest.raises(MemoryError, match="out of it") as error:
        naming_operator(step, RECORDED["choices"])(1)
    assert error.value.__notes__ == [
        "the step takes the operator by 'pallas_triton'; --model.wkv-implementation NAME takes another one, which "
        "rounds differently"
    ]
    with pytest.raises(MemoryError) as error:
        naming_operator(step, BY_TABLE)(1)
    assert not hasattr(error.value, "__notes__")


# Runs


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The implementations of the models whose steps are built."""
    names: list[str | None] = []
    make: Callable[..., Any] = loop.make_train_functions

    def spy(config: TrainConfig, *arguments: Any) -> Any:
        names.append(config.model.wkv_implementation)
        return make(config, *arguments)

    monkeypatch.setattr(loop, "make_train_functions", spy)
    return names


def short(config: TrainConfig, num_steps: int, **training: Any) -> TrainConfig:
    evaluation = dataclasses.replace(config.evaluation, sample_prompts=())
    steps = dataclasses.replace(config.training, num_steps=num_steps, **training)
    return dataclasses.replace(config, training=steps, evaluation=evaluation, profile=None)


def test_a_run_records_its_choice_and_goes_on_with_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[str | None]
) -> None:
    # The program is then the one that other tests have compiled.
    tunings = [Trial("chunked", 1e-7, 1e-3, None)]
    monkeypatch.setattr(autotune, "measure", lambda workload: Tuning(workload, (tunings.pop(),)))
    begun = run(short(config, 4, tune="always"), tmp_path / "run")
    assert "operator: wkv7 by chunked, 1.000 ms a call; measured now, kept in " in begun.output
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["choices"] == {"wkv_implementation": "chunked"}
    assert recorded["config"]["model"]["wkv_implementation"] is None
    resumed = run(short(config, 5), tmp_path / "run")
    assert f"operator: wkv7 by chunked, as {tmp_path / 'run'} took its last steps" in resumed.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["choices"] == recorded["choices"]
    assert taken == [None, "chunked", None, "chunked"]


@pytest.mark.long
def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_was_not_stopped(
    config: TrainConfig, tmp_path: Path, measured: list[Workload], finished: Run
) -> None:
    run(short(config, 4, tune="always"), tmp_path / "run")
    resumed = run(short(config, 8), tmp_path / "run")
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, wkv_implementation="scan"))
    straight = run(short(named, 8), tmp_path / "straight")
    assert_same_bits(resumed.result.state, straight.result.state)
    assert_same_bits(restore(config, tmp_path / "run"), straight.result.state)
    assert not (resumed.result.state.params["head"]["weight"] == finished.result.state.params["head"]["weight"]).all()


def test_a_run_of_the_tables_choice_records_that_and_says_nothing(finished: Run) -> None:
    assert json.loads((finished.folder / "run.json").read_text())["choices"] == BY_TABLE
    assert "operator: " not in finished.output
