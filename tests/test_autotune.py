"""The file of measurements: what is kept is found again, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import pytest
from filelock import FileLock

from rwkv_jax import autotune, host
from rwkv_jax.autotune import TuningFileError
from rwkv_jax.config import ModelConfig
from rwkv_jax.json_object import with_digest
from rwkv_kernels.autotune import Trial, Tuning, Workload, workload_here
from tests.small_runs import names_in

WORKLOAD = workload_here("wkv6", (2, 32, 3, 16, 16), "bfloat16")
TUNING = Tuning(
    WORKLOAD,
    (
        Trial("scan", 2e-7, 2e-3, None),
        Trial("chunked", 1e-7, 1e-3, None),
        Trial("associative_scan", math.inf, None, "WRONG: y is off by inf, at most 1e-04"),
        Trial("pallas_triton", None, None, "cannot: it needs an NVIDIA GPU, and this is cpu"),
    ),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "tuning.json"


def test_what_is_kept_is_found_again(path: Path) -> None:
    assert autotune.find(path, WORKLOAD) is None
    autotune.keep(path, TUNING)
    found = autotune.find(path, WORKLOAD)
    assert found is not None
    assert found.chosen == TUNING.chosen == "chunked"
    # JSON has no infinity.
    without = tuple(trial._replace(error=None) if trial.error == math.inf else trial for trial in TUNING.trials)
    assert found == Tuning(WORKLOAD, without)
    assert names_in(path.parent) == ["tuning.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"operator": "wkv5"},
        {"inputs": "float32"},
        {"gradients": False},
        {"packed": True},
        {"problem": dataclasses.replace(WORKLOAD.problem, shape=(2, 64, 3, 16, 16))},
        {"problem": dataclasses.replace(WORKLOAD.problem, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")},
        {"problem": dataclasses.replace(WORKLOAD.problem, dtype="float64")},
    ],
    ids=str,
)
def test_another_workload_is_another_measurement(path: Path, changes: dict[str, Any]) -> None:
    autotune.keep(path, TUNING)
    other = dataclasses.replace(WORKLOAD, **changes)
    assert autotune.find(path, other) is None
    autotune.keep(path, Tuning(other, (Trial("scan", 0.0, 1.0, None),)))
    for workload, chosen in ((WORKLOAD, "chunked"), (other, "scan")):
        assert getattr(autotune.find(path, workload), "chosen", None) == chosen
    autotune.keep(path, Tuning(WORKLOAD, (Trial("scan", 0.0, 1.0, None),)))  # measured again
    assert getattr(autotune.find(path, WORKLOAD), "chosen", None) == "scan"


def test_two_that_keep_at_once_lose_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [dataclasses.replace(WORKLOAD, inputs=inputs) for inputs in ("float16", "float32")]
    second = threading.Thread(target=lambda: autotune.keep(path, Tuning(others[1], TUNING.trials)))
    write = autotune.replace_file

    def write_late(path: Path, content: bytes) -> None:
        if not second.ident:
            second.start()
            second.join(0.3)  # it has to wait for us
        write(path, content)

    monkeypatch.setattr(autotune, "replace_file", write_late)
    autotune.keep(path, Tuning(others[0], TUNING.trials))
    second.join()
    for workload in others:
        assert getattr(autotune.find(path, workload), "chosen", None) == "chunked"
    assert names_in(path.parent) == ["tuning.json"]


def test_a_lock_that_is_never_freed_is_an_error_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_MAX_WAIT", 0.1)
    path.parent.mkdir()
    with (
        FileLock(path.with_name(".tuning.json.lock")),
        pytest.raises(OSError, match=r"another process holds \.tuning\.json\.lock"),
    ):
        autotune.keep(path, TUNING)
    autotune.keep(path, TUNING)
    assert names_in(path.parent) == ["tuning.json"]


def test_a_file_system_without_locks_is_written_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    autotune.keep(path, TUNING)
    assert autotune.find(path, WORKLOAD) is not None


def test_what_is_measured_fits_into_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune.autotune, "tune", lambda workload, memory, **_: memory)
    monkeypatch.setattr(autotune, "device_memory", lambda device: 10)
    monkeypatch.setattr(host, "memory", lambda: 4)
    on_gpu = dataclasses.replace(WORKLOAD, problem=dataclasses.replace(WORKLOAD.problem, platform="gpu"))
    assert [autotune.measure(workload) for workload in (WORKLOAD, on_gpu)] == [2, 10]


def test_other_versions_and_processors_measure_for_themselves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.keep(path, TUNING)
    for place, name, other in (
        (jax, "__version__", "0.0.1"),
        (autotune, "_kernels_digest", lambda: "another"),
        (autotune, "_compilers", lambda: ("libtpu 0.0.1",)),
        (host, "processor", lambda: "another"),
        (host, "available_cores", lambda: 1000),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            assert autotune.find(path, WORKLOAD) is None
    assert autotune.find(path, WORKLOAD) is not None


def test_compilers_are_named_with_their_versions() -> None:
    assert f"jaxlib {jaxlib.version.__version__}" in autotune._compilers()


@pytest.mark.parametrize("name", ["pallas_mosaic_tpu", "gone"])
def test_a_choice_that_cannot_run_here_is_none(path: Path, name: str) -> None:
    autotune.keep(path, Tuning(WORKLOAD, (Trial(name, 0.0, 1.0, None),)))
    assert autotune.find(path, WORKLOAD) is None


def entry(**changes: Any) -> dict[str, Any]:
    of = {**dict.fromkeys(("operator", "recurrence", "inputs", "platform", "device", "jax", "kernels"), "x")}
    return {"of": of | {"gradients": True, "packed": True, "shape": [1] * 5}, "trials": []} | changes


def content(*entries: Any) -> str:
    return json.dumps(with_digest({"format": autotune.FORMAT, "entries": list(entries)}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its JSON cannot be understood"),
        ("\x00", "its JSON cannot be understood"),
        ("[" * 100_000, "its JSON cannot be understood"),
        ("[]", "its JSON is no object"),
        ('{"name": "package", "version": 1}', "is no file of measurements of this version"),
        (json.dumps(with_digest({"format": "rwkv-jax tuning 0", "entries": []})), "is no file of measurements of this"),
        (json.dumps({"format": autotune.FORMAT, "entries": []}), "has changed since it was written"),
        (content(entry()).replace('"x"', '"y"', 1), "has changed since it was written"),
        (content(3), "has an entry that is no measurement"),
        (content({"of": {}, "trials": []}), "has an entry that is no measurement"),
        (content(entry(of=entry()["of"] | {"shape": [1]})), "has an entry that is no measurement"),
        (content(entry(of=entry()["of"] | {"jax": 1})), "has an entry that is no measurement"),
        (content(entry(trials=[["scan", 1, 1]])), "has an entry that is no measurement"),
        (content(entry(trials=[["scan", 1, "fast", None]])), "has an entry that is no measurement"),
        (content(entry(trials=[[None, 1, 1, None]])), "has an entry that is no measurement"),
        (content(entry(trials=[["scan", 1, math.nan, None]])), "has an entry that is no measurement"),
        (json.dumps(with_digest({"format": autotune.FORMAT, "entries": {}})), "has an entry that is no measurement"),
    ],
    ids=lambda text: text[:30],
)
def test_a_file_that_is_damaged_or_of_others_is_named_and_stays(path: Path, text: str, message: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    for use in (
        lambda: autotune.find(path, WORKLOAD),
        lambda: autotune.keep(path, TUNING),
        lambda: autotune.describe(path),
    ):
        with pytest.raises(TuningFileError, match=rf"tuning\.json: {message}.*delete it to measure again"):
            use()
    assert path.read_text() == text


def test_a_folder_is_no_file(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(TuningFileError, match=r"tuning\.json: cannot be read \(Is a directory\); delete it"):
        autotune.find(path, WORKLOAD)


def test_a_file_is_described_by_a_line_a_measurement(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune.describe(path) == [f"measured operators: none yet in {path}"]
    autotune.keep(path, TUNING)
    autotune.keep(path, Tuning(dataclasses.replace(WORKLOAD, gradients=False, packed=True), ()))
    first, second, third = autotune.describe(path)
    assert first == f"measured operators: 2 in {path}"
    device = f"{host.processor()}, {host.available_cores()} cores"
    assert second == f"  wkv6 B2 T32 H3 N16 M16 bfloat16 on {device}, with gradients: chunked, 1.000 ms"
    assert third == f"  wkv6 B2 T32 H3 N16 M16 bfloat16 on {device}, forward, packed: none is right"
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert autotune.describe(path)[1] == f"{second}; of another version, not used"


def test_the_file_is_the_named_one_or_in_the_users_caches() -> None:
    assert autotune.default_path({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/rwkv-jax/tuning.json")
    assert autotune.default_path({}) == Path("~/.cache/rwkv-jax/tuning.json").expanduser()
    named = {"XDG_CACHE_HOME": "/caches", autotune.VARIABLE: "~/mine.json"}
    assert autotune.default_path(named) == Path("~/mine.json").expanduser()


def test_tests_have_an_empty_file_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = autotune.default_path()
    assert path.parent == tmp_path_factory.getbasetemp()
    assert not path.exists()


def test_a_digest_is_of_the_kernels_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digest = autotune._kernels_digest.__wrapped__
    assert digest() == autotune._kernels_digest()
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(autotune.rwkv_kernels, "__file__", str(tmp_path / "__init__.py"))
    found = set()
    for name in ("a.py", "ops/a.py"):
        (tmp_path / name).write_text("x = 1")
        found.add(digest())
    (tmp_path / "a.py").write_text("x = 2")
    assert len(found | {digest(), autotune._kernels_digest()}) == 4


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ModelConfig("7", width=256, head_dim=64), (2, 32, 2, 64, 64)),
        (ModelConfig("4", width=256), (2, 32, 128, 1, 1)),
    ],
)
def test_a_workload_has_a_devices_share(config: ModelConfig, shape: tuple[int, ...]) -> None:
    workload = autotune.training_workload(config, 2, 32, tensor=2, packed=False)
    assert isinstance(workload, Workload)
    assert (workload.problem.shape, workload.operator) == (shape, f"wkv{config.generation}")
    assert (workload.inputs, workload.gradients, workload.packed) == ("float32", True, False)


def test_an_engine_on_a_gpu_takes_what_was_measured(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.VARIABLE, str(path))
    config = ModelConfig("6", width=256)
    assert autotune.measured_prefill(config, "gpu") is None  # nothing is there
    workload = autotune.prefill_workload(config)
    assert workload is not None
    autotune.keep(path, Tuning(workload, (Trial("associative_scan", 0.0, 1.0, None),)))
    assert autotune.measured_prefill(config, "gpu") == "associative_scan"
    assert autotune.measured_prefill(config, "cpu") is None
    assert autotune.measured_prefill(dataclasses.replace(config, wkv_implementation="scan"), "gpu") is None
    assert autotune.measured_prefill(ModelConfig(architecture="transformer"), "gpu") is None
    path.write_text("{}")
    with pytest.warns(UserWarning, match=r"not used: .*tuning\.json: is no file of measurements"):
        assert autotune.measured_prefill(config, "gpu") is None


def test_a_transformer_has_no_workload() -> None:
    assert autotune.training_workload(ModelConfig(architecture="transformer"), 2, 32) is None


def test_a_decoded_token_is_a_workload_where_one_function_does_it() -> None:
    config = ModelConfig("7", width=256, dtype="bfloat16")
    workload = autotune.decoding_workload(config, 8)
    assert workload is not None
    assert (workload.operator, workload.problem.shape) == ("wkv7_step", (8, autotune.DECODED_TOKENS, 4, 64, 64))
    assert (workload.inputs, workload.gradients, workload.packed) == ("bfloat16", False, False)
    assert autotune.decoding_workload(ModelConfig("6"), 8) is None
    assert autotune.decoding_workload(ModelConfig(architecture="transformer"), 8) is None


def test_what_does_not_last_is_measured_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.VARIABLE, str(path))
    tunings = iter((Tuning(WORKLOAD, (), is_lasting=False), TUNING))
    assert autotune.find_or_measure(WORKLOAD, lambda _: next(tunings)).chosen is None
    assert not path.exists()
    for _ in range(2):
        assert autotune.find_or_measure(WORKLOAD, lambda _: next(tunings)).chosen == "chunked"


def test_measurements_that_hold_here_are_listed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.keep(path, TUNING)
    product = dataclasses.replace(WORKLOAD, operator="int8 product")
    autotune.keep(path, Tuning(product, (Trial("digits", 0.0, 1.0, None),)))
    (found,) = autotune.kept_here(path)
    assert (found.workload, found.chosen) == (WORKLOAD, "chunked")
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert autotune.kept_here(path) == []
