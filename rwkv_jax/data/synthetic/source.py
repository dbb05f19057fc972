"""A synthetic task as the data of a run: rows of any step, for training and held out, and what stands for a corpus."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import numpy as np

from rwkv_jax.checks import require
from rwkv_jax.config import TrainConfig
from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.task import Task
from rwkv_jax.data.synthetic.tasks import parse_task
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens.rows import Rows

_VERSION = 1  # of what the tasks draw; raised when rows of the same name change


@dataclasses.dataclass(frozen=True)
class SyntheticRows:
    """Rows of any step, made when they are read: pure functions of task, seed, part, step and row."""

    task: Task
    seed: int
    part: Literal["training", "held-out"]
    batch_size: int
    """B."""
    sequence_length: int
    """T."""

    def read(self, step: int, rows: slice = slice(None)) -> Rows:
        """Makes the selected ones of a step's B rows."""
        row_index = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        draws = Draws(f"synthetic {self.part} {self.seed}", row_index)
        return self.task.rows(draws, self.sequence_length)

    def row_locations(self, step: int, rows: slice = slice(None)) -> list[str]:
        """Each row for messages."""
        first = step * self.batch_size
        return [f"{self.task}, row {row}" for row in range(first, first + self.batch_size)[rows]]


class SyntheticCorpus:
    """What a run asks of its data besides rows, as of a `Corpus`."""

    bytes_per_token: float | None = None
    """Symbols are no text of which bytes could be counted."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.tokenizer: Tokenizer = task.tokenizer
        identity = f"{_VERSION} {task}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        """Hex digest of the task and its fields."""


def task_of(config: TrainConfig) -> Task | None:
    """The synthetic task of a run, checked against its model and lengths; None for a run on text.

    Raises:
      ConfigError: the task is not known, has more symbols than the model, or has no rows of a length.
    """
    if not config.data.is_synthetic:
        return None
    task = parse_task(config.data.source)
    require(
        config.model.vocab_size >= task.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"{task} has {task.vocab_size} symbols, with end of text; set it to {task.vocab_size} or more",
    )
    task.check_length("training.sequence_length", config.training.sequence_length)
    for length in config.evaluation.lengths:
        task.check_length("evaluation.lengths", length)
    return task


def synthetic_rows(
    task: Task, config: TrainConfig, part: Literal["training", "held-out"] = "training", length: int | None = None
) -> SyntheticRows:
    """The rows of a run; of its sequence length, or another one."""
    training = config.training
    return SyntheticRows(task, config.seed, part, training.batch_size, length or training.sequence_length)
