"""`rwkv plan`: its flags, what is wrong with some, and a plan from beginning to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.cli import parse_plan
from rwkv_jax.cli.plan import Plan, write_json
from rwkv_jax.config import ConfigError

ROOT = Path(__file__).parents[1]

CONFIG = """
from rwkv_jax.config import ModelConfig, TrainConfig, StepConfig

def config() -> TrainConfig:
    model = ModelConfig("4", vocab_size=64, num_layers=2, width=16)
    return TrainConfig(model=model, training=StepConfig(batch_size=4, sequence_length=8))
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def rwkv_plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
    command = [sys.executable, "-W", "error", "-c", program, "plan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_flags_change_the_file(config_file: Path) -> None:
    plan = parse_plan([str(config_file), "--topology", "cpu:2", "--parallel.fsdp", "2", "--model.width", "32"])
    assert isinstance(plan, Plan)
    assert (plan.config_file, plan.topology, plan.json) == (config_file, "cpu:2", None)
    assert (plan.config.parallel.fsdp, plan.config.model.width, plan.config.model.num_layers) == (2, 32, 2)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        parse_plan([str(tmp_path / "none.py"), "--topology", "cpu:2"])


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ([], "''"),
        (["--topology", "cpu:2"], "'--topology'"),
        (["--topology", "cpu:2", "small.py"], "'--topology'"),
        (["--model.width", "32", "small.py", "--topology", "cpu:2"], "'--model.width'"),
    ],
)
def test_the_config_comes_first(arguments: list[str], first: str) -> None:
    with pytest.raises(ConfigError, match=rf"plan: {first} stands where .*: rwkv plan CONFIG_FILE --topology NAME"):
        parse_plan(arguments)


def test_help_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_plan(["--help"])
    assert caught.value.code == 0
    assert "--topology" in capsys.readouterr().out


def test_a_plan_needs_a_topology(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_plan([str(config_file)])
    assert caught.value.code == 2
    assert "--topology" in capsys.readouterr().err


def test_a_json_file_that_is_there_or_has_no_place_is_refused_first(config_file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "plan.json"
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is there already; name another file"):
        parse_plan([str(config_file), "--topology", "cpu:2", "--json", str(taken)]).run()
    with pytest.raises(ConfigError, match="there is no folder"):
        parse_plan([str(config_file), "--topology", "cpu:2", "--json", str(tmp_path / "no" / "plan.json")]).run()
    assert taken.read_text(encoding="utf-8") == "mine"
    nowhere = tmp_path / "nowhere.json"
    nowhere.symlink_to(tmp_path / "on a disk that is not there")
    with pytest.raises(ConfigError, match="is there already; name another file"):
        parse_plan([str(config_file), "--topology", "cpu:2", "--json", str(nowhere)]).run()


def test_json_is_written_whole_and_never_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json({"version": 2, "peak": None}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"version": 2, "peak": None}
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"plan.json': exists already and is not overwritten; move it away"):
        write_json({"version": 2}, path)
    assert path.read_text(encoding="utf-8") == "mine"
    assert [x.name for x in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_beginning_to_end(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = rwkv_plan(config_file, "--topology", "cpu:2", "--parallel.fsdp", 2, "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu:2: fsdp 2; a step has 32 tokens")
    assert "verdict: fits" in done.stdout
    assert json.loads(path.read_text(encoding="utf-8"))["mesh"]["fsdp"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "b200:1x8"), "rwkv: --topology 'b200:1x8': no device is called 'b200'"),
        (("--topology", "cpu:8", "--parallel.fsdp", "3"), "rwkv: parallel: data auto, fsdp 3"),
    ],
)
def test_what_cannot_be_planned_is_said(config_file: Path, arguments: tuple[str, ...], message: str) -> None:
    done = rwkv_plan(config_file, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
