"""Batches as a pure function of (seed, step): no iterator, nothing to save, the same on any number of hosts.

Sequence number `step * batch_size + row` of the run is found by arithmetic alone. Shape letters: B rows, T time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from rwkv_jax.config import ConfigError

_ROUNDS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class BatchIndices:
    """Where each row of a batch comes from; three [B] int64 arrays."""

    epochs: np.ndarray
    """How often the whole corpus was read before this row."""
    slots: np.ndarray
    """Which of the epoch's windows the row is."""
    starts: np.ndarray
    """Position of the row's first token in the token file."""


def num_slots(num_tokens: int, sequence_length: int) -> int:
    """Windows of T predicted tokens in an epoch."""
    return max(num_tokens - 1, 0) // sequence_length


def check_corpus_fits(num_tokens: int, *, batch_size: int, sequence_length: int) -> None:
    """Raises ConfigError if the training tokens are not enough for one batch of distinct windows."""
    slots = num_slots(num_tokens, sequence_length)
    if slots >= batch_size:
        return
    remedies = ["use more text"]
    if (num_tokens - 1) // batch_size >= 1:
        remedies.insert(0, f"set training.sequence_length to at most {(num_tokens - 1) // batch_size}")
    if slots >= 1:
        remedies.insert(0, f"set training.batch_size to at most {slots}")
    raise ConfigError(
        f"training.batch_size = {batch_size}: the corpus is shorter than one batch, its {num_tokens} training tokens "
        f"give {slots} sequences of training.sequence_length = {sequence_length} (one batch takes "
        f"{batch_size * sequence_length + 1} tokens); {', or '.join(remedies)}"
    )


def indices_at(
    num_tokens: int, *, seed: int, step: int, batch_size: int, sequence_length: int, rows: slice = slice(None)
) -> BatchIndices:
    """Where the rows of a step's batch come from, e.g. to name a batch whose loss is not finite.

    `rows` selects from the B rows, so that a host reads its own. Raises ConfigError if the corpus is shorter than
    one batch.
    """
    check_corpus_fits(num_tokens, batch_size=batch_size, sequence_length=sequence_length)
    slots_per_epoch = num_slots(num_tokens, sequence_length)
    elements = step * batch_size + np.arange(batch_size, dtype=np.int64)[rows]
    epochs, places = np.divmod(elements, slots_per_epoch)
    slots, offsets = np.empty_like(places), np.empty_like(places)
    for epoch in np.unique(epochs):
        members = epochs == epoch
        keys = _epoch_keys(seed, int(epoch))
        slots[members] = _permute(places[members], slots_per_epoch, keys[:_ROUNDS])
        offsets[members] = keys[_ROUNDS] % sequence_length
    return BatchIndices(epochs, slots, (slots * sequence_length + offsets) % num_tokens)


def batch_at(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    sequence_length: int,
    rows: slice = slice(None),
) -> np.ndarray:
    """The step's batch, int32 [B, T + 1]: the first T tokens of a row are read, the last T predicted.

    Each epoch reads all windows once in an order of its own, and shifts them by an offset of its own; the tokens are
    a ring, so that no shift loses any. Raises ConfigError if the corpus is shorter than one batch.
    """
    indices = indices_at(
        len(tokens), seed=seed, step=step, batch_size=batch_size, sequence_length=sequence_length, rows=rows
    )
    positions = indices.starts[:, None] + np.arange(sequence_length + 1)
    return tokens[positions % len(tokens)].astype(np.int32)


def num_evaluation_batches(num_tokens: int, *, batch_size: int, sequence_length: int) -> int:
    """Batches that `evaluation_windows` needs to predict every token but the first."""
    return -(-(num_tokens - 1) // (batch_size * sequence_length))


def evaluation_windows(
    tokens: np.ndarray, *, batch_size: int, sequence_length: int, num_batches: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens int32 [B, T + 1] and mask float32 [B, T], 1 at each position t whose next token t + 1 is to be predicted.

    The windows cover the tokens in order and predict each but the first exactly once; all shapes are alike, what is
    missing in the last one is padded and masked. `num_batches` takes so many of them, evenly spaced over the tokens.
    """
    total = num_evaluation_batches(len(tokens), batch_size=batch_size, sequence_length=sequence_length)
    taken = total if num_batches is None else min(num_batches, total)
    row_starts = np.arange(batch_size) * sequence_length
    for index in range(taken):
        start = (index * total // taken) * batch_size * sequence_length
        positions = start + row_starts[:, None] + np.arange(sequence_length + 1)
        inside = positions < len(tokens)
        batch = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int32)
        yield np.where(inside, batch, np.int32(0)), inside[:, 1:].astype(np.float32)


def _epoch_keys(seed: int, epoch: int) -> np.ndarray:
    """Random uint64 numbers of an epoch: one for each round of the permutation, and one for the offset.

    From a hash, not from numpy's generators, whose streams may change with its version.
    """
    count = _ROUNDS + 1
    words = b"".join(
        hashlib.blake2b(f"{seed} {epoch} {word}".encode(), digest_size=8).digest() for word in range(count)
    )
    return np.frombuffer(words, "<u8").astype(np.uint64)


def _permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(size) sends each place; takes no memory beyond the places themselves.

    A Feistel network permutes a power of four; what lands outside is sent on until it lands inside, which happens
    since the places themselves are inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scrambled uint64 numbers (the finaliser of splitmix64); products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
