"""The recipes of configs/: published sizes, official settings, a docstring that says what was planned, and plans."""

from __future__ import annotations

import ast
import dataclasses
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.plan.devices import parse_topology
from rwkv_jax.plan.run import count_work
from rwkv_jax.recipes import official_run
from rwkv_jax.training.schedule import learning_rate_schedule

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

PUBLISHED = {
    # arXiv 2305.13048, appendix G, table 3. It has 128 or 256 rows.
    "rwkv4_169m": (6e-4, 1e-5, "exponential", 256, 1024),
    "rwkv4_430m": (4e-4, 1e-5, "exponential", 256, 1024),
    "rwkv4_1_5b": (3e-4, 1e-5, "exponential", 256, 1024),
    "rwkv4_3b": (1.5e-4, 1e-5, "exponential", 256, 1024),
    "rwkv4_7b": (1.5e-4, 1e-5, "exponential", 256, 1024),
    "rwkv4_14b": (1e-4, 7e-6, "exponential", 256, 1024),
    # arXiv 2404.05892, table 17: 1,572,864, 786,432 and 2,359,296 tokens a step.
    "rwkv6_1_6b": (3e-4, 2e-5, "cosine", 384, 4096),
    "rwkv6_3b": (2e-4, 1.5e-5, "cosine", 192, 4096),
    "rwkv6_7b": (1.5e-4, 1e-5, "cosine", 576, 4096),
    # BlinkDL/rwkv-7-pile: 8x30, 8x30 and 8x45 rows, of which 16 devices get 352.
    "rwkv7_0_1b": (8e-4, 3e-5, "cosine", 240, 4096),
    "rwkv7_0_4b": (6e-4, 2e-5, "cosine", 240, 4096),
    "rwkv7_1_5b": (5e-4, 1.5e-5, "cosine", 352, 4096),
    # Chosen by us.
    "rwkv7_2_9b": (3e-4, 1.5e-5, "cosine", 256, 4096),
    "rwkv7_7_2b": (3e-4, 1.5e-5, "cosine", 256, 4096),
}
"""Learning rate, its last value, its schedule, rows of a step and tokens of a row."""

CONSTANT_MINI_EPOCHS = {
    "rwkv4_169m": 361,
    "rwkv4_430m": 411,
    "rwkv4_1_5b": 443,
    "rwkv4_3b": 451,
    "rwkv4_7b": 465,
    "rwkv4_14b": 544,
}
"""Mini-epochs, of 8043, in which the learning rate of RWKV-4 stays at its highest: arXiv 2305.13048, table 3."""


def recipe(name: str) -> TrainConfig:
    return load_config(ROOT / "configs" / f"{name}.py")


def test_there_is_a_recipe_for_every_released_size() -> None:
    assert sorted(PARAMETERS) == sorted(PUBLISHED) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_size_is_that_of_the_released_model(name: str) -> None:
    model = recipe(name).model
    if model.generation == "7":
        model = dataclasses.replace(model, unused_value_residual=True)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_and_batches_are_as_published(name: str) -> None:
    config = recipe(name)
    optimizer, training = config.optimizer, config.training
    assert (
        optimizer.learning_rate,
        optimizer.final_learning_rate,
        optimizer.schedule,
        training.batch_size,
        training.sequence_length,
    ) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_those_of_the_generation(name: str) -> None:
    config = recipe(name)
    optimizer, training = config.optimizer, config.training
    found = (optimizer.warmup_steps, optimizer.beta2, optimizer.epsilon, optimizer.weight_decay)
    assert found == {"4": (0, 0.99, 1e-8, 0.0), "6": (10, 0.99, 1e-18, 0.001), "7": (10, 0.99, 1e-18, 0.1)}[name[4]]
    assert (optimizer.beta1, optimizer.clip_norm) == (0.9, 1.0)
    assert config.model.vocab_size == (50277 if name[4] == "4" else 65536)
    assert (config.data.order, config.data.held_out) == ("official", 0.0)
    assert not training.reset_at_documents
    assert config.model.dtype == "bfloat16"
    # The least recomputation that is planned to fit.
    remat = "none" if name.startswith("rwkv4") else "operator" if name == "rwkv7_0_1b" else "full"
    assert training.remat == remat
    assert training.fused_loss
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize(("name", "tokens"), [("rwkv4_3b", 332.1e9), ("rwkv6_3b", 1.12e12), ("rwkv7_2_9b", 3.1e12)])
def test_one_pass_over_the_corpus(name: str, tokens: float) -> None:
    training = recipe(name).training
    assert training.num_steps * training.batch_size * training.sequence_length == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize("name", CONSTANT_MINI_EPOCHS)
def test_rwkv4_decays_exponentially_after_its_constant_mini_epochs(name: str) -> None:
    config = recipe(name)
    peak, final = PUBLISHED[name][:2]
    constant = CONSTANT_MINI_EPOCHS[name]
    schedule = learning_rate_schedule(config.optimizer, config.training.num_steps)

    def rate(mini_epoch: float) -> float:
        return np.asarray(schedule(round(mini_epoch * 40320 / config.training.batch_size))).item()

    assert rate(0) == rate(constant - 1) == pytest.approx(peak)
    assert rate(constant + 10) < peak
    for mini_epoch in (constant + 100, 2000, 5000, 8043):
        expected = peak * math.exp(math.log(final / peak) * (mini_epoch - constant) / (8043 - constant))
        assert rate(mini_epoch) == pytest.approx(expected, rel=5e-4)


def test_a_model_that_was_not_released_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"name = 'rwkv7_14b': there is no such recipe; must be one of rwkv4_169m, "):
        official_run("rwkv7_14b", fsdp=1)


@pytest.mark.parametrize("name", RECIPES)
def test_rows_go_evenly_on_the_devices_that_the_recipe_is_planned_for(name: str) -> None:
    config = recipe(name)
    slices = runpy.run_path(str(ROOT / "benchmarks" / "plan_table.py"))["SLICES"]
    for text in slices[name]:
        assert config.training.batch_size % parse_topology(text).num_devices == 0


@pytest.mark.parametrize("name", [*RECIPES, "minipile"])
def test_docstring_names_the_hardware_and_the_plan(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"rwkv train configs/{name}.py" in docstring
    assert f"rwkv plan configs/{name}.py --topology " in docstring
    command = docstring.split("--topology ")[1]
    topology = parse_topology(command.split()[0])
    work = count_work(recipe(name))
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
