"""Every config file builds, and says how it is run."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import TrainConfig
from rwkv_jax.training.checkpoints import abstract_state
from rwkv_jax.training.step import make_trainer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_builds_a_model_of_the_size_it_says(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    params = abstract_state(make_trainer(config), config.seed).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.model.num_parameters()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_docstring_gives_the_command(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python train.py configs/{path.name}" in docstring


def test_no_two_configs_share_a_run_folder() -> None:
    folders = [load_config(path).run_dir for path in CONFIGS]
    assert len(set(folders)) == len(folders)
