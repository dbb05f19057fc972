"""Runs in this process, and what is looked at in their folders."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from rwkv_jax.config import TrainConfig
from rwkv_jax.data.tokenizers import train_sentencepiece
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training import loop
from rwkv_jax.training.functions import abstract_state, make_train_functions
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.state import TrainState
from tests.small_runs import names_in
from tests.training.saved import restore as restore_checkpoint


class Run(NamedTuple):
    result: loop.TrainResult
    folder: Path
    config: TrainConfig
    output: str
    compiled: Counter[str]
    """How often each function was compiled."""


def run(config: TrainConfig, folder: Path, *, restart: bool = False) -> Run:
    """Trains in this process."""
    config = dataclasses.replace(config, run_dir=str(folder))
    compiled: Counter[str] = Counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and str(record.msg).startswith("Compiling %s with"):
                compiled[str(record.args[0])] += 1

    counter, logger = Count(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(counter)
    try:
        with jax.log_compiles(), contextlib.redirect_stdout(io.StringIO()) as output:
            result = loop.train(config, restart=restart)
    finally:
        logger.removeHandler(counter)
    return Run(result, folder, config, output.getvalue(), compiled)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(folder: Path, kind: str) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def restore(config: TrainConfig, folder: Path, step: int | None = None) -> TrainState:
    """The newest checkpoint, or that of a step."""
    if step is not None:
        folder = Path(shutil.copytree(folder, folder.with_name(f"only-{step}")))
        for name in names_in(folder / "checkpoints"):
            if name != str(step):
                shutil.rmtree(folder / "checkpoints" / name)
    with ckpt.Checkpoints(folder, config.checkpoint.keep, pytest.fail) as checkpoints:
        functions = make_train_functions(config)
        return restore_checkpoint(checkpoints, functions.kept(abstract_state(functions)))


def other_tokenizer(config: TrainConfig, folder: Path) -> TrainConfig:
    train_sentencepiece([f"import module{i} as m{i % 9}\n" for i in range(999)], 300, folder / "other.model")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder / "other.model")))
