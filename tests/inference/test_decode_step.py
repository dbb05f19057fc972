"""Whether an engine decodes with the kernel for single tokens: by a check and a measurement, made once for a device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax import Array

from rwkv_jax import autotune
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine import decode_step
from rwkv_jax.inference.engine.decode_step import choose_step
from rwkv_kernels import PARTS, dispatch
from rwkv_kernels.autotune import Trial, Tuning, Workload
from tests.inference.models import CONFIGS, GREEDY, LONG_IDS, quick_engine, random_model

# From JAX 0.11 on, each use says so; it works as before.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

CONFIG = CONFIGS["7"]
PLATFORM = jax.default_backend()


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file of measurements, with nothing remembered from other tests."""
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "tuning.json"))
    decode_step._fastest.cache_clear()
    yield tmp_path / "tuning.json"
    decode_step._fastest.cache_clear()


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The kernel is interpreted and can run here; shapes of v in all programs that it is traced for."""
    step = PARTS["wkv7_step"].implementations
    kernel = functools.partial(step["pallas_triton"].run, interpret=True)
    shapes: list[tuple[int, ...]] = []

    def run(inputs: dict[str, Array], state: Array, **options: Any) -> Any:
        shapes.append(inputs["v"].shape)
        return kernel(inputs, state, **options)

    monkeypatch.setitem(step, "pallas_triton", dispatch.Implementation(run, dispatch.anything))  # pyright: ignore[reportArgumentType]
    return shapes


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float | None]) -> list[Workload]:
    """What is measured: XLA's form takes a second, the kernel these for each number of rows, or is wrong."""
    workloads: list[Workload] = []

    def measure(workload: Workload) -> Tuning:
        workloads.append(workload)
        time = seconds[workload.problem.shape[0]]
        failure = None if time is not None else "WRONG: o is off by 1e-01, at most 1e-04"
        return Tuning(workload, (Trial("xla", 1e-7, 1.0, None), Trial("pallas_triton", 1e-7, time, failure)))

    monkeypatch.setattr(decode_step, "measure", measure)
    return workloads


def test_an_engine_decodes_with_a_kernel_that_is_right_and_faster(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]], path: Path
) -> None:
    """The same text, by a program that has it once a layer; prompts do not take it."""
    workloads = measured(monkeypatch, {1: 0.5, 4: 0.9})
    model = random_model(CONFIG)
    plain = quick_engine(model, fresh=True, tune="never").generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert not workloads
    assert not tokens
    found = quick_engine(model, fresh=True).generate(LONG_IDS, max_tokens=3, sampling=GREEDY)
    assert [workload.problem.shape for workload in workloads] == [(1, 32, 2, 8, 8), (4, 32, 2, 8, 8)]
    assert tokens == [(1, 2, 8)] * CONFIG.num_layers
    assert found.ids == plain.ids
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert autotune.describe(path)[1].startswith("  wkv7_step B1 T32 H2 N8 M8 float32 on ")


@pytest.mark.parametrize("seconds", [{1: 2.0, 4: 0.5}, {1: 0.5, 4: 2.0}, {1: None, 4: 0.5}, {1: 0.5, 4: None}], ids=str)
def test_one_that_is_wrong_or_slower_for_any_number_of_rows_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]], seconds: dict[int, float | None]
) -> None:
    measured(monkeypatch, seconds)
    assert choose_step(CONFIG, PLATFORM, (1, 4)) is None


def test_it_is_measured_once_for_a_device(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]], path: Path
) -> None:
    workloads = measured(monkeypatch, {1: 0.5, 4: 0.9})
    for _ in range(2):
        assert choose_step(CONFIG, PLATFORM, (1, 2, 4)) == "pallas_triton"
        decode_step._fastest.cache_clear()  # as in another process
    assert len(workloads) == 2
    path.write_text("{}")
    with pytest.warns(UserWarning, match=r"not kept: .*tuning\.json: is no file of measurements"):
        assert choose_step(CONFIG, PLATFORM, (4,)) == "pallas_triton"
    assert path.read_text() == "{}"


def test_nothing_is_measured_where_only_the_models_equations_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = measured(monkeypatch, {})
    assert choose_step(CONFIG, PLATFORM, (1, 4)) is None
    assert not workloads


def test_nothing_is_measured_where_something_is_named_or_nothing_would_fit(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]]
) -> None:
    workloads = measured(monkeypatch, {})
    assert choose_step(ModelConfig("7", step_implementation="xla"), PLATFORM, (1, 4)) is None
    assert choose_step(CONFIGS["6"], PLATFORM, (1, 4)) is None
    assert choose_step(CONFIG, "elsewhere", (1, 4)) is None
    assert not workloads


def test_a_device_that_cannot_measure_decodes_by_the_models_equations(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]]
) -> None:
    def full(workload: Workload) -> Tuning:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(decode_step, "measure", full)
    with pytest.warns(UserWarning, match="wkv7_step is not measured: RESOURCE_EXHAUSTED"):
        assert choose_step(CONFIG, PLATFORM, (1,)) is None


def test_the_measurement_itself_takes_a_kernel_only_if_it_is_right(
    monkeypatch: pytest.MonkeyPatch, tokens: list[tuple[int, ...]]
) -> None:
    right = PARTS["wkv7_step"].implementations["pallas_triton"]

    def wrong(*inputs: Any, **options: Any) -> Any:
        o, state = right.run(*inputs, **options)
        return 1.01 * o, state

    monkeypatch.setitem(
        PARTS["wkv7_step"].implementations,  # pyright: ignore[reportArgumentType]
        "pallas_triton",
        dispatch.Implementation(wrong, dispatch.anything),
    )
    workload = autotune.decoding_workload(CONFIG, 2)
    assert workload is not None
    xla, kernel = autotune.measure(workload).trials
    assert xla.failure is None
    assert (kernel.failure or "").startswith("WRONG: o is off by 1e-02")
