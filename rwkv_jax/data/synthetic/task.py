"""What a synthetic task is: symbols, rows as functions of random numbers, and what it scores without being learned.

A row of T inputs begins with end_of_text, as every text does, so T - 1 symbols follow. Shape letters: n rows, T time.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from rwkv_jax.checks import require
from rwkv_jax.config import ConfigError
from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.tokenizers import SymbolTokenizer
from rwkv_jax.data.tokens.rows import Rows

BEGIN = 0
"""Id of end_of_text, with which every row begins."""
BLANK = 1
"""Id of the symbol `.`, which fills up a row, in tasks that have it."""
MARK = 2
"""Id of the symbol `|`, which says that the answer follows, in tasks that have it."""
SIGNS = (".", "|")
"""First symbols of tasks that have these two."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A synthetic task: a frozen dataclass whose fields are what `synthetic:NAME(field=value)` may set."""

    name: ClassVar[str]
    """By which `data.source` names it."""
    labels: ClassVar[bool] = False
    """Whether targets are labels of the inputs, and not the next tokens: then a model of it generates no text."""

    @property
    @abc.abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """The vocabulary after end_of_text: ids 1, 2, ..."""

    @property
    @abc.abstractmethod
    def min_length(self) -> int:
        """The smallest T."""

    @abc.abstractmethod
    def rows(self, draws: Draws, length: int) -> Rows:
        """Rows of T = `length` inputs, with a mask that is 1 where the target is scored; at least once in each row."""

    @abc.abstractmethod
    def chance(self, length: int) -> float:
        """Accuracy at the scored positions without what is to be learned; each task says what is known then."""

    def variants(self) -> Mapping[str, Task]:
        """Tasks of the same symbols that are evaluated besides, by name: such as one for each distance."""
        return {}

    @property
    def vocab_size(self) -> int:
        """Number of ids: end_of_text and the symbols."""
        return len(self.symbols) + 1

    @property
    def tokenizer(self) -> SymbolTokenizer:
        """The tokenizer of the symbols."""
        return SymbolTokenizer(self.symbols)

    def check_length(self, field: str, length: int) -> None:
        """Raises ConfigError, with the config's field, for a length of which there are no rows."""
        require(length >= self.min_length, field, length, f"{self} needs at least {self.min_length}")

    def require(self, condition: bool, field: str, remedy: str) -> None:
        """Raises ConfigError with the task's field and its value unless the condition holds."""
        require(condition, f"data.source, {self.name}.{field}", getattr(self, field), remedy)

    def require_positive(self, *fields: str) -> None:
        """Raises ConfigError for the first of the fields that is below 1; one that is None is not looked at."""
        for field in fields:
            value = getattr(self, field)
            self.require(value is None or value >= 1, field, "must be at least 1")

    def __str__(self) -> str:
        """`NAME(field=value, ...)`, with all fields."""
        values = ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self).items())
        return f"{self.name}({values})"


def rows_of_text(tokens: np.ndarray, is_answer: np.ndarray, length: int) -> Rows:
    """Rows in which a model predicts the next token, filled up with blanks.

    Args:
      tokens: [n, m], with m <= T + 1.
      is_answer: bool, broadcastable to [n, m], the tokens that are scored.
      length: T.
    """
    rest = ((0, 0), (0, length + 1 - tokens.shape[1]))
    filled = np.pad(tokens, rest, constant_values=BLANK).astype(np.int32)
    counted = np.pad(np.broadcast_to(is_answer, tokens.shape), rest)
    return Rows(filled, counted[:, 1:].astype(np.float32))


def prompt_and_answer(task: Task, length: int) -> tuple[str, str]:
    """A prompt, the text of a row up to its first answer, and that answer. Raises ConfigError if targets are labels."""
    if task.labels:
        raise ConfigError(f"{task}: labels its inputs; there is no text to go on with")
    rows = task.rows(Draws(f"prompt {task}", np.zeros(1, np.int64)), length)
    assert rows.mask is not None
    tokens, scored = rows.tokens[0].tolist(), np.flatnonzero(rows.mask[0])
    first = int(scored[0])
    last = first + next((step for step, at in enumerate(scored) if at != first + step), len(scored))
    decode = task.tokenizer.decode
    return decode(tokens[1 : first + 1]).strip(), decode(tokens[first + 1 : last + 1]).strip()
