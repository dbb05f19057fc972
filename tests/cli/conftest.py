"""The `rwkv` command in this process, and a run for it."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from rwkv_jax import cli, run_folder
from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.config import DataConfig, ModelConfig, TrainConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.functions import make_train_functions
from tests.cli.commands import Command, Printed
from tests.programs import compiled_quickly
from tests.small_runs import CODE

CONFIG = TrainConfig(model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles quickly and keeps programs on disk: every command would compile the same ones again, for seconds."""
    programs = tmp_path_factory.getbasetemp() / "programs"  # for all modules
    with programs_kept_in(programs), compiled_quickly():
        yield


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that messages are not broken into lines."""
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def rwkv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command."""

    def rwkv(*arguments: object, stdin: str = "") -> Printed:
        monkeypatch.setattr(sys, "argv", ["rwkv", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        cli.main()
        printed = capsys.readouterr()
        return Printed(printed.out, printed.err)

    return rwkv


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, the best and the newest, of different random parameters."""
    folder = tmp_path_factory.mktemp("generate")
    source = folder / "source.py"
    source.write_text(CODE)
    data = DataConfig(source=str(source), cache_dir=str(folder / "cache"))
    corpus = prepare_corpus(data, 300, lambda line: None)
    run_dir = folder / "run"
    run_folder.prepare_run_dir(run_dir)
    run_folder.write_run(run_dir, dataclasses.replace(CONFIG, data=data), {}, corpus.tokenizer)
    init = jax.jit(make_train_functions(CONFIG).init)
    with ckpt.Checkpoints(run_dir, 2, print) as checkpoints:
        checkpoints.save_best(init(jax.random.key(1)), 4, 2.0)
        checkpoints.save(init(jax.random.key(2)), 8)
    return run_dir
