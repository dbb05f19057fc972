"""The config of `rwkv train` from a file and flags: its help and its errors."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import cli
from rwkv_jax.config import ConfigError, TrainConfig

REPOSITORY = Path(__file__).parents[2]


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a config and of the configs in it, as (flag without dashes, type)."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from fields_of(typing.cast(type, types[field.name]), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", types[field.name]


FIELDS = dict(fields_of(TrainConfig))


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `rwkv train` says about arguments that it does not take."""
    with pytest.raises(SystemExit) as exit_:
        cli.parse_train_config(arguments)
    assert exit_.value.code not in (0, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


class TestTrainHelp:
    @pytest.fixture(scope="module")
    @staticmethod
    def help_text() -> str:
        """Its words, without line breaks and frames; a much wider terminal would get two columns."""
        command, narrow = [sys.executable, "train.py", "--help"], os.environ | {"COLUMNS": "120"}
        done = subprocess.run(command, cwd=REPOSITORY, env=narrow, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return " ".join(re.sub("[─-╿]", " ", done.stdout).split())

    def test_walk_finds_fields_of_every_kind(self) -> None:
        """What the tests below rely on."""
        assert {"run_dir", "model.width", "optimizer.clip_norm", "checkpoint.keep", "profile"} <= FIELDS.keys()
        assert len(FIELDS) > 40

    @pytest.mark.parametrize("name", FIELDS)
    def test_every_field_has_help_and_default(self, help_text: str, name: str) -> None:
        flag = "--" + name.replace("_", "-")
        # The flag, its negation if it has one, what it takes, and its help up to the default.
        found = re.search(rf" {re.escape(flag)}(?:, --\S+)?((?: (?!--)\S+)+?) \(default: ([^)]*)\)", help_text)
        assert found is not None
        assert len(found[1].split()) >= 3
        value: Any = TrainConfig()
        for part in name.split("."):
            value = getattr(value, part)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert found[2].strip("'") == shown

    def test_defaults_are_those_of_the_config_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "120")  # one column, whatever the number of sections
        path = write_config(tmp_path, "model=ModelConfig(width=192)")
        with pytest.raises(SystemExit) as exit_:
            cli.parse_train_config([str(path), "--help"])
        assert exit_.value.code == 0
        assert re.search(r"--model\.width[^\n]*\n[^\n]*\(default: 192\)", capsys.readouterr().out)


def write_config(folder: Path, arguments: str) -> Path:
    path = folder / "config.py"
    path.write_text(f"from rwkv_jax.config import *\n\ndef config():\n    return TrainConfig({arguments})\n")
    return path


class TestTrainConfig:
    def test_nothing_gives_the_defaults(self) -> None:
        assert cli.parse_train_config([]) == TrainConfig()

    def test_file_and_overrides(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, "seed=3, model=ModelConfig(width=192, num_layers=5)")
        config = cli.parse_train_config([str(path), "--model.num-layers", "7", "--run-dir", "elsewhere"])
        assert (config.seed, config.model.width, config.model.num_layers) == (3, 192, 7)
        assert config.run_dir == "elsewhere"

    @pytest.mark.parametrize("flag", ["--model.num-layers", "--model.num_layers"])
    def test_hyphens_and_underscores(self, flag: str) -> None:
        assert cli.parse_train_config([flag, "9"]).model.num_layers == 9

    @pytest.mark.parametrize(
        ("arguments", "field", "value"),
        [
            (["--profile", "2", "3"], "profile", (2, 3)),
            (["--profile", "None"], "profile", None),
            (["--training.remat", "operator"], "training.remat", "operator"),
            (["--training.carry-state"], "training.carry_state", True),
            (["--training.no-reset-at-documents"], "training.reset_at_documents", False),
            (["--parallel.fsdp", "4"], "parallel.fsdp", 4),
            (["--parallel.data", "auto"], "parallel.data", "auto"),
            (["--training.loss-chunk", "64"], "training.loss_chunk", 64),
            (["--model.ffn-width", "None"], "model.ffn_width", None),
            (["--optimizer.learning-rate", "1e-3"], "optimizer.learning_rate", 1e-3),
            (["--optimizer.schedule", "wsd"], "optimizer.schedule", "wsd"),
            (["--logging.wandb", "project"], "logging.wandb", "project"),
            (["--evaluation.sample-prompts", "a", "b c"], "evaluation.sample_prompts", ("a", "b c")),
            (["--data.source", "-"], "data.source", "-"),
        ],
    )
    def test_values_of_every_type(self, arguments: list[str], field: str, value: object) -> None:
        config: Any = cli.parse_train_config(arguments)
        for part in field.split("."):
            config = getattr(config, part)
        assert config == value

    @pytest.mark.parametrize("arguments", [["--model.widht", "64"], ["--width", "64"], ["--lr=1"]])
    def test_unknown_field_is_named(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert arguments[0].split("=")[0] in fail(arguments, capsys)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--model.width", "wide"],
            ["--model.width", "1.5"],
            ["--optimizer.learning-rate", "fast"],
            ["--model.dtype", "float16"],
            ["--training.remat", "maybe"],
            ["--profile", "3"],
            ["--data.source"],
        ],
    )
    def test_ill_typed_value_is_named(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        message = fail(arguments, capsys)
        assert arguments[-1] in message
        assert arguments[0] in message or "Unrecognized" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model.width", "100"], "model.width = 100: must be a multiple of model.head_dim = 64; the nearest are"),
            (["--model.num-layers", "1"], "model.num_layers = 1: RWKV needs at least 2 layers"),
            (["--training.accumulation-steps", "3"], "training.batch_size = 8: must be a multiple of"),
            (["--training.num-steps", "5"], "optimizer.warmup_steps = 10: must be less than training.num_steps = 5"),
            (["--optimizer.final-learning-rate", "1"], "optimizer.final_learning_rate = 1.0: must not exceed"),
            (["--data.held-out", "1.5"], "data.held_out = 1.5"),
            (["--profile", "3", "2"], "profile = (3, 2): must be FIRST LAST"),
            (["--seed", "-1"], "seed = -1: must fit in 32 bits"),
            (["--run-dir", ""], "run_dir = '': name a folder"),
        ],
    )
    @pytest.mark.parametrize("with_file", [False, True])
    def test_contradictions_are_told_in_our_words(
        self,
        arguments: list[str],
        message: str,
        with_file: bool,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = [str(write_config(tmp_path, "seed=1"))] if with_file else []
        assert message in fail([*file, *arguments], capsys)

    def test_process_fails_without_a_traceback(self) -> None:
        command = [sys.executable, "train.py", "--model.width", "100"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode != 0
        assert "model.width = 100" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


class TestConfigFile:
    def test_missing(self) -> None:
        with pytest.raises(ConfigError, match=r"'configs/nothing\.py': no such config file; configs/ holds"):
            cli.parse_train_config(["configs/nothing.py", "--seed", "1"])

    @pytest.mark.parametrize("source", ["", "config = 3", "def config():\n    return {'seed': 1}\n"])
    def test_without_a_config(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "c.py").write_text(source)
        with pytest.raises(ConfigError, match=r"c\.py': must define config\(\) -> TrainConfig"):
            cli.parse_train_config([str(tmp_path / "c.py")])

    def test_contradiction_inside(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.width = 100"):
            cli.parse_train_config([str(write_config(tmp_path, "model=ModelConfig(width=100)"))])
