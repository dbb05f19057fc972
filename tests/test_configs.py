"""Every config file builds, and says how it is run; every generation runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import (
    ApplicationConfig,
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
SEEN = {
    "python_stdlib": r"nats.*bits\s+a\s+byte",
    "tune": r"nats.*bits\s+a\s+byte",
    "distill": r"nats.*bits\s+a\s+byte",
    "convert": "nats",
    "chat": "nats a token that counts",
    "dpo": r"accuracy.*margin",
    "orpo": r"accuracy.*margin",
    "simpo": r"accuracy.*margin",
    "kto": "accuracy",
    "grpo": "reward",
    "synthetic": r"%.*chance",
    "seq2seq": r"exact",
    "vision": r"%",
}
"""What a config's docstring says was seen, by how its name begins."""
RUN_HERE = [(path, kind) for path in CONFIGS for kind in SEEN if path.name.startswith(kind)]
SYNTHETIC = [path for path in CONFIGS if path.name.startswith("synthetic")]
CONVERTED = [path for path in CONFIGS if path.name.startswith("convert")]
APPLICATIONS = {
    "audio_digits.py": 428_555,
    "seq2seq_dates.py": 327_880,
    "seq2seq_reversal.py": 327_880,
    "series_sunspots.py": 41_651,
    "vision_digits.py": 295_242,
    "vision_digits_vit.py": 297_866,
}
"""Parameters of each application's config."""
OF_DOCSTRINGS = [path for path in CONFIGS if path.name.startswith(("dpo", "orpo", "simpo", "kto", "grpo"))]
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
    if isinstance(config, ApplicationConfig):
        # A model of the application's own, whose stacks are of that size.
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == APPLICATIONS[path.name]
        return
    own = {name: part for name, part in params.items() if name not in ("adapter", "initial_state", "teacher")}
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == config.model.num_parameters()


def docstring_of(path: Path) -> str:
    """A config file's."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    return docstring


@pytest.mark.parametrize(("path", "kind"), RUN_HERE, ids=lambda part: getattr(part, "name", part))
def test_docstring_gives_the_command_and_what_was_seen(path: Path, kind: str) -> None:
    docstring = docstring_of(path)
    assert f"rwkv train configs/{path.name}" in docstring
    assert re.search(rf"Seen on .*minutes?.*{SEEN[kind]}", docstring, re.DOTALL)


@pytest.mark.parametrize("path", OF_DOCSTRINGS, ids=lambda path: path.name)
def test_docstring_says_how_the_data_are_made(path: Path) -> None:
    assert "python -m examples.docstrings.pairs" in docstring_of(path)


def test_docstring_of_chats_says_how_they_are_made() -> None:
    assert "python configs/chat_functions.py" in docstring_of(Path(__file__).parents[1] / "configs/chat_functions.py")


@pytest.mark.parametrize("path", SYNTHETIC, ids=lambda path: path.name)
def test_synthetic_configs_have_a_task(path: Path) -> None:
    assert task_of(load_config(path)) is not None


@pytest.mark.parametrize("path", CONVERTED, ids=lambda path: path.name)
def test_each_stage_of_a_conversion_begins_with_the_one_before(path: Path) -> None:
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
