"""Rows of chats: whole samples packed into rows or one a row, or streams that go on from step to step.

Which samples share a row, or a stream, is chosen once, as a function of the seed; rows are reshuffled each epoch. So
row b of step s is a pure function of (seed, s, b), as of any data here.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.chat.samples import Samples
from rwkv_jax.data.tokens.permutation import ROUNDS, permute, random_words, shuffle_epochs
from rwkv_jax.data.tokens.rows import Rows

Span = tuple[int, int]
"""Positions in the flat arrays, from the first to before the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of whole samples, and padding behind them, which is of no sample and does not count."""

    samples: Samples
    packed: tuple[tuple[int, ...], ...]
    """The samples of each row of an epoch."""
    seed: int
    batch_size: int
    """B."""
    sequence_length: int
    """T."""
    end_of_text: int

    def read(self, step: int, rows: slice = slice(None)) -> Rows:
        """The selected ones of a step's B rows, with targets and a mask."""
        return self.read_rows(self._row_index(step, rows))

    def read_rows(self, row_index: np.ndarray) -> Rows:
        """Rows by how many were read before, [n] int64."""
        spans = [_spans(self.samples, self.packed[row]) for row in self._chosen(row_index)]
        return fill_rows(self.samples, spans, self.sequence_length, self.end_of_text)

    def row_locations(self, step: int, rows: slice = slice(None)) -> list[str]:
        """Each row's first sample, for messages."""
        return self.locations(self._row_index(step, rows))

    def locations(self, row_index: np.ndarray) -> list[str]:
        """The same of rows as `read_rows` has them."""
        return [self.samples.places[self.packed[row][0]] for row in self._chosen(row_index)]

    def epochs(self, num_rows: float) -> float:
        """How often so many rows read all samples."""
        return num_rows / len(self.packed)

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        share = len(self.samples.tokens) / (len(self.packed) * self.sequence_length)
        return (
            f"{self.epochs(num_steps * self.batch_size):.2f} epochs of {len(self.samples):,} chats in "
            f"{len(self.packed):,} rows, {share:.1%} full"
        )

    def _row_index(self, step: int, rows: slice) -> np.ndarray:
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]

    def _chosen(self, row_index: np.ndarray) -> list[int]:
        return shuffle_epochs(row_index, len(self.packed), f"chats {self.seed}").tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedRows:
    """B streams of samples, each a ring, of which every step reads the next T tokens."""

    samples: Samples
    """In the order of the streams."""
    stream_starts: np.ndarray
    """int64 [B + 1], where each stream begins in the flat arrays, and their length."""
    sequence_length: int
    """T."""
    end_of_text: int

    def read(self, step: int, rows: slice = slice(None)) -> Rows:
        """The selected ones of a step's B rows, with targets and a mask."""
        spans = [self._window(stream, step) for stream in self._streams(rows)]
        return fill_rows(self.samples, spans, self.sequence_length, self.end_of_text)

    def row_locations(self, step: int, rows: slice = slice(None)) -> list[str]:
        """Each row's first sample, for messages."""
        firsts = [self._window(stream, step)[0][0] for stream in self._streams(rows)]
        return [self.samples.places[int(np.searchsorted(self.samples.starts, at, "right")) - 1] for at in firsts]

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        tokens = num_steps * self.sequence_length * (len(self.stream_starts) - 1)
        return (
            f"{tokens / len(self.samples.tokens):.2f} epochs of {len(self.samples):,} chats, "
            f"{len(self.samples.tokens):,} tokens"
        )

    def _streams(self, rows: slice) -> range:
        return range(len(self.stream_starts) - 1)[rows]

    def _window(self, stream: int, step: int) -> list[Span]:
        start, end = self.stream_starts[stream : stream + 2].tolist()
        at, missing, spans = start + step * self.sequence_length % (end - start), self.sequence_length, []
        while missing:
            taken = min(missing, end - at)
            spans.append((at, at + taken))
            at, missing = start, missing - taken
        return spans


ChatRows = PackedRows | StreamedRows


def packed_rows(
    samples: Samples, *, apart: bool, seed: int, batch_size: int, sequence_length: int, end_of_text: int
) -> PackedRows:
    """Rows of whole samples; with `apart`, one a row. No sample may be longer than T."""
    together = [(index,) for index in range(len(samples))]
    if not apart:
        together = pack(samples.lengths.tolist(), sequence_length, _shuffled(len(samples), seed))
    return PackedRows(samples, tuple(together), seed, batch_size, sequence_length, end_of_text)


def streamed_rows(
    samples: Samples, *, seed: int, batch_size: int, sequence_length: int, end_of_text: int
) -> StreamedRows:
    """Streams of about the same length. Raises ConfigError for fewer samples than streams."""
    if len(samples) < batch_size:
        raise ConfigError(
            f"training.batch_size = {batch_size}: with training.carry_state each row is a stream of chats, and there "
            f"are {len(samples)}; set it to at most that, or switch training.carry_state off"
        )
    lengths, streams = samples.lengths, [list[int]() for _ in range(batch_size)]
    shortest = [(0, stream) for stream in range(batch_size)]
    for index in _shuffled(len(samples), seed):
        length, stream = heapq.heappop(shortest)
        streams[stream].append(index)
        heapq.heappush(shortest, (length + int(lengths[index]), stream))
    totals = [int(lengths[stream].sum()) for stream in streams]
    starts = np.cumsum([0, *totals], dtype=np.int64)
    return StreamedRows(samples.reordered([i for each in streams for i in each]), starts, sequence_length, end_of_text)


def pack(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[tuple[int, ...]]:
    """Items packed into rows, the longest first, each where the least room is left that suffices.

    Args:
      lengths: of each item, from 1 to `room`.
      order: all items; which comes first among those of a length.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, sorted
    for item in sorted(order, key=lambda item: -lengths[item]):
        at = bisect.bisect_left(rooms, lengths[item])
        if at == len(rooms):
            left, row = room, len(rows)
            rows.append([])
        else:
            left = rooms[at]
            row = rows_by_room[left].pop()
            if not rows_by_room[left]:
                del rows_by_room[left], rooms[at]
        rows[row].append(item)
        left -= lengths[item]
        if left:
            if left not in rows_by_room:
                bisect.insort(rooms, left)
                rows_by_room[left] = []
            rows_by_room[left].append(row)
    return [tuple(row) for row in rows]


def evaluation_rows(
    samples: Samples,
    *,
    layout: Literal["packed", "apart", "windows"],
    batch_size: int,
    sequence_length: int,
    end_of_text: int,
    num_batches: int | None = None,
) -> Iterator[Rows]:
    """Batches of rows in which each target that counts is predicted once; the last one is filled up with empty rows.

    Args:
      layout: rows of whole samples, or of one each; or windows of T tokens of all, of which those with nothing that
        counts are left out, and what lies before a window is not seen in it.
      num_batches: so many, evenly spaced; None for all.
    """
    if layout == "packed":
        rows = [_spans(samples, row) for row in pack(samples.lengths.tolist(), sequence_length, range(len(samples)))]
    elif layout == "apart":
        rows = [_spans(samples, [index]) for index in range(len(samples))]
    else:
        ends = (
            (at, min(at + sequence_length, len(samples.tokens)))
            for at in range(0, len(samples.tokens), sequence_length)
        )
        rows = [[span] for span in ends if samples.mask[slice(*span)].any()]
    total = -(-len(rows) // batch_size)
    taken = total if num_batches is None else min(num_batches, total)
    for index in range(taken):
        start = index * total // taken * batch_size
        some = rows[start : start + batch_size]
        yield fill_rows(samples, [*some, *([] for _ in range(batch_size - len(some)))], sequence_length, end_of_text)


def fill_rows(samples: Samples, rows: Sequence[Sequence[Span]], sequence_length: int, end_of_text: int) -> Rows:
    """Rows of spans, one after the other, and of end_of_text behind them, each a text of its own."""
    shape = (len(rows), sequence_length)
    tokens = np.full((len(rows), sequence_length + 1), end_of_text, np.int32)
    targets, mask = np.full(shape, end_of_text, np.int32), np.zeros(shape, np.float32)
    for row, spans in enumerate(rows):
        at = 0
        for start, end in spans:
            place = slice(at, at + end - start)
            tokens[row, place] = samples.tokens[start:end]
            targets[row, place] = samples.targets[start:end]
            mask[row, place] = samples.mask[start:end]
            at = place.stop
    return Rows(tokens, mask, targets)


def _spans(samples: Samples, row: Sequence[int]) -> list[Span]:
    return [(int(samples.starts[index]), int(samples.starts[index + 1])) for index in row]


def _shuffled(count: int, seed: int) -> list[int]:
    return permute(np.arange(count, dtype=np.int64), count, random_words(f"chats {seed}", ROUNDS)).tolist()
