"""Batches of a training or evaluation step, made from rows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Sharding

from rwkv_jax.config import StepConfig
from rwkv_jax.data.tokens.rows import Rows
from rwkv_jax.parallel.coordination import global_array


class Batch(NamedTuple):
    """Rows of text: inputs, targets and document boundaries."""

    tokens: Any
    """int32 [B, T]."""
    targets: Any
    """int32 [B, T], the token after each input, or the label of the input in a task that has labels."""
    segment_ids: Any = None
    """int32 [B, T]; a document begins where the id changes along a row. None: each row is one text."""
    continues_previous: Any = None
    """bool [B], whether a row continues the previous step's row; None if no state is carried."""
    mask: Any = None
    """float32 [B, T], 1 where a target counts; None if all do."""
    dropout_keys: Any = None
    """uint32 [B, T], random numbers for the dropout of each token; None without dropout."""
    teacher_ids: Any = None
    """int32 [B, T, k], a stored teacher's most likely tokens; None without one."""
    teacher_log_p: Any = None
    """float16 [B, T, k + 1], their log-probabilities, and that of all others together."""


def make_batch(
    rows: np.ndarray,
    *,
    end_of_text: int | None,
    carries_state: bool = False,
    mask: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Batch:
    """A batch from int32 rows [B, T + 1].

    Args:
      end_of_text: the token that begins each document; None lets documents see the text before them.
      carries_state: whether rows continue the previous step's.
      mask: float32 [B, T], 1 at each position where the target counts.
      targets: int32 [B, T]; None takes the next tokens.
    """
    tokens, targets = rows[:, :-1], rows[:, 1:] if targets is None else targets
    segment_ids = continues_previous = None
    if end_of_text is not None:
        segment_ids = np.cumsum(tokens == end_of_text, axis=1, dtype=np.int32)
    if carries_state:
        continues_previous = np.ones(len(tokens), bool) if end_of_text is None else tokens[:, 0] != end_of_text
    return Batch(tokens, targets, segment_ids, continues_previous, mask)


def dropout_keys(seed: int, step: int, rows: slice, length: int) -> np.ndarray:
    """The random numbers of rows of a step, uint32 [rows, length]: functions of seed, step and row alone."""
    draws = (np.random.default_rng([seed, step, row, 0xD20]) for row in range(rows.start, rows.stop))
    return np.stack([row.integers(0, 2**32, length, np.uint32) for row in draws])


def batch_loader(
    tokens_sharding: Sharding,
    rows_sharding: Sharding,
    training: StepConfig,
    end_of_text: int,
    dropout_seed: int | None = None,
    teacher: Callable[[int, slice], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Callable[..., Batch]:
    """Makes a function that loads batches; each process reads only its own devices' rows.

    Args:
      tokens_sharding: of arrays [B, T].
      rows_sharding: of arrays [B].
      end_of_text: the token that begins each document.
      dropout_seed: of the random numbers for dropout; None without dropout.
      teacher: (step, rows) -> a stored teacher's most likely tokens and their log-probabilities; None without one.

    Returns:
      (read, *, trains=False, step=0) -> Batch, where read maps a slice of the B rows to `Rows`; with `trains`, rows
      continue those of the previous step if the run carries states, and have random numbers for the step's dropout.
    """
    shape = (training.batch_size, training.sequence_length)

    def load(read: Callable[[slice], Rows], *, trains: bool = False, step: int = 0) -> Batch:
        parts: dict[tuple[int, int], Batch] = {}

        def part(rows: slice) -> Batch:
            if (rows.start, rows.stop) not in parts:
                tokens, mask, targets = read(rows)
                made = make_batch(
                    tokens,
                    end_of_text=end_of_text if training.reset_at_documents else None,
                    carries_state=trains and training.carry_state,
                    mask=mask,
                    targets=targets,
                )
                if trains and dropout_seed is not None:
                    made = made._replace(dropout_keys=dropout_keys(dropout_seed, step, rows, shape[1]))
                if trains and teacher is not None:
                    ids, log_p = teacher(step, rows)
                    made = made._replace(teacher_ids=ids, teacher_log_p=log_p)
                parts[rows.start, rows.stop] = made
            return parts[rows.start, rows.stop]

        def placed(name: str, sizes: tuple[int, ...]) -> Any:
            sharding, whole = rows_sharding if len(sizes) == 1 else tokens_sharding, shape[: len(sizes)] + sizes[2:]
            return global_array(sharding, whole, lambda rows: getattr(part(rows), name))

        tokens = placed("tokens", shape)
        some = next(iter(parts.values()))._replace(tokens=None)  # the others have the same fields
        others = {name: None if value is None else placed(name, value.shape) for name, value in some._asdict().items()}
        return Batch(**others | {"tokens": tokens})

    return load
