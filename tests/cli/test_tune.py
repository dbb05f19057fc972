"""`rwkv tune`: what it prints, keeps and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax import autotune
from rwkv_jax.cli.tune import parse_tune
from rwkv_jax.config import ConfigError
from rwkv_kernels.autotune import Trial, Tuning, Workload
from tests.cli.commands import Command

CONFIG = """
from rwkv_jax.config import ModelConfig, StepConfig, TrainConfig

def config() -> TrainConfig:
    return TrainConfig(model=ModelConfig(vocab_size=64, num_layers=2, width=64), training=StepConfig(batch_size=4))
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """What has been measured, without taking any time."""
    workloads: list[Workload] = []

    def measure(workload: Workload, path: Path, *, again: bool) -> Tuning:
        workloads.append(workload)
        slow, fast = Trial("scan", 2e-7, 4e-3, None), Trial("chunked", 1e-7, 2e-3, None)
        return Tuning(workload, (slow, fast, Trial("pallas_triton", None, None, "fails: ValueError: no")))

    monkeypatch.setattr(autotune, "measure", measure)
    return workloads


def test_a_table_is_printed_and_kept(
    rwkv: Command, config_file: Path, measured: list[Workload], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(autotune.VARIABLE, str(tmp_path / "named.json"))
    for cache, flags in ((tmp_path / "named.json", ()), (tmp_path / "new" / "x.json", ("--cache", "new/x.json"))):
        monkeypatch.chdir(tmp_path)
        printed = rwkv("tune", config_file, "--training.sequence-length", 128, "--model.dtype", "bfloat16", *flags)
        assert printed.err == ""
        first, *lines, last = printed.out.splitlines()
        assert first == f"{measured[-1]}:"
        assert first.startswith("wkv7 B4 T128 H1 N64 M64 float32 on ")
        assert first.endswith(", bfloat16 inputs, with gradients, packed:")
        assert [" ".join(line.split()) for line in lines] == [
            "scan 2e-07 4.000 ms right",
            "chunked 1e-07 2.000 ms taken: the fastest",
            "pallas_triton - - fails: ValueError: no",
        ]
        with_variable = f" with {autotune.VARIABLE}={cache}" if flags else ""
        kept = "new/x.json" if flags else cache
        assert last.startswith(f"kept in {kept}; on a GPU or TPU{with_variable} new runs take it")
        assert getattr(autotune.find(cache, measured[-1]), "chosen", None) == "chunked"


def test_a_run_on_more_devices_has_smaller_shares(
    rwkv: Command, config_file: Path, measured: list[Workload], tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "x.json")
    rwkv("tune", config_file, "--devices", 2, *cache)
    assert measured[-1].problem.shape == (2, 512, 1, 64, 64)
    with pytest.raises(
        SystemExit, match=r"rwkv: --parallel\.sequence 2: nothing is measured for a mesh that splits time"
    ):
        rwkv("tune", config_file, "--devices", 4, "--parallel.sequence", 2, *cache)
    with pytest.raises(SystemExit, match="rwkv: --devices 0: must be a whole number, not less than 1"):
        rwkv("tune", config_file, "--devices", 0, *cache)
    with pytest.raises(SystemExit, match=r"rwkv: training\.batch_size: 4 rows at a time .* = 8 devices"):
        rwkv("tune", config_file, "--devices", 8, *cache)


def test_prefill_is_another_workload(
    rwkv: Command, config_file: Path, measured: list[Workload], tmp_path: Path
) -> None:
    printed = rwkv("tune", config_file, "--prefill", "--cache", tmp_path / "x.json")
    assert printed.out.startswith("wkv7 B1 T512 H1 N64 M64 float32 on ")
    assert ", float32 inputs, forward:\n" in printed.out
    assert printed.out.endswith(f"; on a GPU or TPU with {autotune.VARIABLE}={tmp_path / 'x.json'} engines take it\n")


def test_prefill_is_of_one_device(rwkv: Command, config_file: Path, measured: list[Workload]) -> None:
    with pytest.raises(SystemExit, match="rwkv: --devices 2: prefill is measured on one device"):
        rwkv("tune", config_file, "--prefill", "--devices", 2)
    assert not measured


def test_what_does_not_last_is_not_kept(
    rwkv: Command, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = Trial("scan", None, None, "fails: RESOURCE_EXHAUSTED")
    monkeypatch.setattr(autotune, "measure", lambda workload, *_, **__: Tuning(workload, (failed,), is_lasting=False))
    with pytest.raises(SystemExit, match="rwkv: not kept, since memory was out or the device failed"):
        rwkv("tune", config_file, "--cache", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_file_of_others_is_refused_before_anything_is_measured(
    rwkv: Command, config_file: Path, measured: list[Workload], tmp_path: Path
) -> None:
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    with pytest.raises(SystemExit, match=r"rwkv: .*package\.json: is no file of measurements of this version"):
        rwkv("tune", config_file, "--cache", tmp_path / "package.json")
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'
    with pytest.raises(SystemExit, match=r"rwkv: --model.architecture 'transformer': has no operator to tune"):
        rwkv("tune", config_file, "--model.architecture", "transformer", "--cache", tmp_path / "x.json")
    assert not measured


def test_where_all_are_wrong_the_exit_status_says_so(
    rwkv: Command, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = Trial("scan", 0.5, None, "WRONG: y is off by 5e-01, at most 1e-04")
    monkeypatch.setattr(autotune, "measure", lambda workload, *_, **__: Tuning(workload, (wrong,)))
    with pytest.raises(SystemExit, match="rwkv: none is right on this device"):
        rwkv("tune", config_file, "--cache", tmp_path / "x.json")


def test_the_config_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--devices", "2", "small.py"]):
        with pytest.raises(ConfigError, match=r"tune: '.*' stands where the config file does.*: rwkv tune CONFIG_FILE"):
            parse_tune(arguments)
    with pytest.raises(SystemExit) as caught:
        parse_tune(["--help"])
    assert caught.value.code == 0
    assert "--cache" in capsys.readouterr().out
