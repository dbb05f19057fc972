"""Every config file builds, and says how it is run; every generation runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import (
    Generation,
    ModelConfig,
    TrainConfig,
)
from rwkv_jax.data.synthetic.source import task_of
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.run_folder import write_run
from rwkv_jax.training.functions import abstract_state, make_train_functions
from tests.small_runs import small_config, train_and_learn

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
RUN_HERE = [path for path in CONFIGS if path.name.startswith("python_stdlib")]
TUNED = [path for path in CONFIGS if path.name.startswith("tune")]
CHATS = [path for path in CONFIGS if path.name.startswith("chat")]
PREFERENCES = [path for path in CONFIGS if path.name.startswith("dpo")]
SYNTHETIC = [path for path in CONFIGS if path.name.startswith("synthetic")]
CONVERTED = [path for path in CONFIGS if path.name.startswith("convert")]
"""tests/test_recipes.py has the others, which were planned and never run."""


def begin_run(folder: str) -> None:
    """A run folder here, of the config that trains it, without any checkpoint."""
    config = next(config for config in map(load_config, CONFIGS) if config.run_dir == folder)
    Path(folder).mkdir(parents=True)
    write_run(Path(folder), config, {}, ByteTokenizer())


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_builds_a_model_of_the_size_it_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    if config.distillation.teacher is not None:
        monkeypatch.chdir(tmp_path)
        begin_run(config.distillation.teacher)
    params = abstract_state(make_train_functions(config)).params
    own = {name: part for name, part in params.items() if name not in ("adapter", "initial_state", "teacher")}
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == config.model.num_parameters()


@pytest.mark.parametrize("path", RUN_HERE + TUNED, ids=lambda path: path.name)
def test_docstring_gives_the_command_and_what_was_seen(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*nats.*bits a byte", docstring, re.DOTALL)


@pytest.mark.parametrize("path", CHATS, ids=lambda path: path.name)
def test_docstring_of_chats_gives_the_commands_and_what_was_seen(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python configs/{path.name}" in docstring
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*nats a token that counts", docstring, re.DOTALL)


@pytest.mark.parametrize("path", PREFERENCES, ids=lambda path: path.name)
def test_docstring_of_preferences_gives_the_commands_and_what_was_seen(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert "python -m examples.docstrings.pairs" in docstring
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*accuracy.*margin", docstring, re.DOTALL)


@pytest.mark.parametrize("path", SYNTHETIC, ids=lambda path: path.name)
def test_docstring_of_a_task_gives_the_command_and_what_was_seen(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*%.*chance", docstring, re.DOTALL)
    assert task_of(load_config(path)) is not None


@pytest.mark.parametrize("path", CONVERTED, ids=lambda path: path.name)
def test_docstring_of_a_stage_gives_the_command_and_each_begins_with_the_one_before(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(r"Seen on .*minutes.*nats|Not run yet", docstring, re.DOTALL)
    configs, stage = [load_config(each) for each in CONVERTED], CONVERTED.index(path)
    assert configs[stage].initial_weights == (configs[stage - 1].run_dir if stage else None)
    assert configs[stage].distillation.copy == (stage == 0)
    assert configs[stage].model == configs[0].model


def test_no_two_configs_share_a_run_folder() -> None:
    folders = [load_config(path).run_dir for path in CONFIGS]
    assert len(set(folders)) == len(folders)


@pytest.mark.long
@pytest.mark.parametrize("generation", ["4", "5.2", "6"])
def test_every_generation_runs_from_beginning_to_end(generation: Generation, tmp_path: Path) -> None:
    """RWKV-7 does in tests/train, which looks closer."""
    model = ModelConfig(generation, vocab_size=300, num_layers=2, width=32, head_dim=16)
    train_and_learn(small_config(model, tmp_path))
