"""Batches of held-out tokens that predict each token once. Shape letters: B rows, T time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rwkv_jax.data.tokens.rows import Rows


def num_evaluation_batches(num_tokens: int, *, batch_size: int, sequence_length: int) -> int:
    """Number of batches that `evaluation_windows` needs to predict every token but the first."""
    return -(-(num_tokens - 1) // (batch_size * sequence_length))


def evaluation_windows(
    tokens: np.ndarray,
    *,
    batch_size: int,
    sequence_length: int,
    num_batches: int | None = None,
    mask: np.ndarray | None = None,
) -> Iterator[Rows]:
    """Batches of rows with a mask, 1 at each position t where token t + 1 is predicted.

    The windows cover the tokens in order and predict each but the first exactly once; all batches have the same shape,
    the last one is padded and masked. `num_batches` selects that many, evenly spaced over the tokens. `mask` [n] marks
    the tokens that count; None counts all.
    """
    total = num_evaluation_batches(len(tokens), batch_size=batch_size, sequence_length=sequence_length)
    taken = total if num_batches is None else min(num_batches, total)
    row_starts = np.arange(batch_size) * sequence_length
    for index in range(taken):
        start = (index * total // taken) * batch_size * sequence_length
        positions = start + row_starts[:, None] + np.arange(sequence_length + 1)
        inside = positions < len(tokens)
        batch = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int32)
        counted = inside if mask is None else inside & mask[np.minimum(positions, len(tokens) - 1)]
        yield Rows(np.where(inside, batch, np.int32(0)), counted[:, 1:].astype(np.float32))
