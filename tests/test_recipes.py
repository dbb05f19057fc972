"""The recipes of configs/: published sizes, official settings, a docstring that says what was planned, and plans."""

from __future__ import annotations

import ast
import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import TrainConfig
from rwkv_jax.parallel.devices import parse_topology
from rwkv_jax.training.optimizer import learning_rate_schedule
from rwkv_jax.training.plan import work_of

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("rwkv*.py"))

PARAMETERS = {
    "rwkv4_169m": 169_342_464,
    "rwkv4_430m": 430_397_440,
    "rwkv4_1_5b": 1_515_106_304,
    "rwkv4_3b": 2_984_627_200,
    "rwkv4_7b": 7_392_649_216,
    "rwkv4_14b": 14_148_597_760,
    "rwkv6_1_6b": 1_599_873_024,
    "rwkv6_3b": 3_099_863_040,
    "rwkv6_7b": 7_635_746_816,
    # With layer 0's unused value residual, as the official formula counts.
    "rwkv7_0_1b": 191_084_544,
    "rwkv7_0_4b": 450_834_432,
    "rwkv7_1_5b": 1_527_668_736,
    "rwkv7_2_9b": 2_948_065_280,
    "rwkv7_7_2b": 7_199_932_416,
}
"""Of the released models."""


def recipe(name: str) -> TrainConfig:
    return load_config(ROOT / "configs" / f"{name}.py")


def test_there_is_a_recipe_for_every_released_size() -> None:
    assert sorted(PARAMETERS) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_size_is_that_of_the_released_model(name: str) -> None:
    model = recipe(name).model
    if model.generation == "7":
        model = dataclasses.replace(model, unused_value_residual=True)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_official(name: str) -> None:
    config = recipe(name)
    optimizer, training = config.optimizer, config.training
    width = config.model.width
    assert optimizer.learning_rate == (6e-4 if width == 768 else 4e-4 if width == 1024 else 3e-4)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.9, 0.99, 1.0)
    if config.model.generation == "4":
        assert (optimizer.weight_decay, optimizer.epsilon, config.model.vocab_size) == (0.0, 1e-8, 50277)
    else:
        assert (optimizer.weight_decay, optimizer.epsilon, config.model.vocab_size) == (0.1, 1e-18, 65536)
    assert (config.data.order, config.data.held_out) == ("official", 0.0)
    assert not training.reset_at_documents
    assert (config.model.dtype, training.remat) == ("bfloat16", "full")
    assert training.batch_size * training.sequence_length in (240 * 4096, 256 * 4096)
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", [*RECIPES, "minipile"])
def test_docstring_names_the_hardware_and_the_plan(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python train.py configs/{name}.py" in docstring
    assert f"rwkv plan configs/{name}.py --topology " in docstring
    command = docstring.split("--topology ")[1]
    topology = parse_topology(command.split()[0])
    work = work_of(recipe(name))
    assert f"{topology}" in docstring
    assert "GiB" in docstring
    assert work.tokens > 0


def test_the_table_has_every_recipe() -> None:
    slices = runpy.run_path(str(ROOT / "benchmarks" / "plan_table.py"))["SLICES"]
    assert sorted(slices) == RECIPES
    for pair in slices.values():
        assert [parse_topology(text).device.name for text in pair] == ["h100", "v5p"]
        # The same rows for each of the devices.
        assert {parse_topology(text).num_devices for text in pair} in ({8}, {16}, {32}, {64})
    committed = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert "rwkv7_7_2b | h100:8x8" in committed


def test_minipile_follows_the_official_schedule() -> None:
    config = recipe("minipile")
    rate = learning_rate_schedule(config.optimizer, config.training.num_steps)
    for mini_epoch, expected in {0: 5.9975e-4, 1: 5.9899e-4, 11: 5.6441e-4}.items():
        assert float(rate((mini_epoch + 1) * 2520 - 1)) == pytest.approx(expected, abs=6e-9)  # pyright: ignore
    assert config.training.num_steps * 16 * 512 == pytest.approx(1_498_226_207, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["rwkv4_169m", "rwkv7_0_1b"])
def test_a_recipe_is_planned_on_cpus(name: str, tmp_path: Path) -> None:
    program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
    command = [sys.executable, "-W", "error", "-c", program, "plan", f"configs/{name}.py", "--topology", "cpu:8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the compiler says the same" in done.stdout
