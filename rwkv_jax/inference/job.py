"""One text on its way through the engine: what is still to be read, what has been written, and who shows it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.inference.programs import Row
from rwkv_jax.inference.requests import Chunk, FinishReason, Request
from rwkv_jax.inference.snapshot import Snapshot
from rwkv_jax.inference.text import TextStream


@dataclasses.dataclass(eq=False)
class Reader:
    """One slot's worth of reading: a prompt, or the text that steers it."""

    ids: tuple[int, ...]
    """Tokens to read."""
    row: Row | None = None
    """What its slot held when it was given up; None of a text that never gave one up."""
    num_read: int = 0
    """How many of `ids` its slot has read."""
    slot: int | None = None
    """None while it has none."""
    parting: int = 0
    """How many of `ids` another known text has, too: worth keeping the state there."""

    @property
    def next_remaining(self) -> int:
        """Tokens to be read before a state is kept or the text ends."""
        return (self.parting if self.num_read < self.parting else len(self.ids)) - self.num_read

    @property
    def remaining(self) -> int:
        """Tokens still to be read."""
        return len(self.ids) - self.num_read


class Tables(NamedTuple):
    """What a slot is told of each token, [V]; see `programs.Slots`."""

    occurrences: NDArray[np.float32]
    bias: NDArray[np.float32]
    stops: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Tail:
    """The last burst of a text: where it began, and what was written in it."""

    before: Snapshot
    ids: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Job:
    """A request and how far it is; belongs to the scheduler, whose lock guards it."""

    request: Request
    index: int
    """Which of the prompts of a call it is."""
    readers: list[Reader]
    """The text's own, and behind it that of the text which guides it."""
    tables: Callable[[], Tables]
    """Makes what its slots are told of each token."""
    text: TextStream
    most_uncollected: int | None = None
    """Chunks at which it waits for its reader; None for texts that are collected as a whole."""
    waits_for: Job | None = None
    """One whose prompt, which this one's goes on from, is being read."""
    chunks: collections.deque[Chunk] = dataclasses.field(default_factory=collections.deque)
    """Written, and not yet collected."""
    num_written: int = 0
    """Tokens written, a stop token included."""
    burst: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the last burst that are part of the text, a stop token included."""
    burst_was_whole: bool = True
    """Whether the slot has read no more than these."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    is_abandoned: bool = False
    """Nobody will collect it; set by whoever forgets it, at any moment."""
    is_done: bool = False
    """Ended, refused, cancelled or failed: it holds no slot and writes nothing more."""
    snapshot: Snapshot | None = None
    """The state after all that was written, of a request that asked to keep it."""
    tail: Tail | None = None
    """How to get from there back to a token of the last burst."""

    @property
    def is_reading(self) -> bool:
        """Whether some of what it has to read is unread."""
        return any(reader.remaining for reader in self.readers)

    @property
    def slots(self) -> list[int]:
        """The slots it has."""
        return [reader.slot for reader in self.readers if reader.slot is not None]

    @property
    def has_begun(self) -> bool:
        """Whether it has left the queue for the first time."""
        return self.is_done or bool(self.slots) or self.num_written > 0

    @property
    def is_paused(self) -> bool:
        """Whether it waits for its reader: so that a state stays within one burst of what has been read, and the chunks
        of a reader who stays away do not pile up."""
        most = 1 if self.request.keep else self.most_uncollected
        return most is not None and len(self.chunks) >= most

    @property
    def num_tokens(self) -> int:
        """Tokens that its slot has read since the text began."""
        start = 0 if self.request.start is None else self.request.start.num_tokens
        return start + self.readers[0].num_read + self.num_written

    def write(
        self,
        tokens: Sequence[int],
        log_probabilities: Sequence[float],
        top: Sequence[tuple[tuple[int, float], ...]],
    ) -> None:
        """Takes a burst's tokens up to where the text ends."""
        self.burst, self.burst_was_whole = [], True
        for position, token in enumerate(tokens):
            self.num_written += 1
            self.burst.append(token)
            if token in self.request.stop_ids:
                self._end("stop", token, self.text.flush())
            else:
                shown = self.text.push(token)
                ids, values, likeliest = (token,), (log_probabilities[position],), tuple(top[position : position + 1])
                if self.text.stopped is not None:
                    self._end("stop", self.text.stopped, shown, ids, values, likeliest)
                elif self.num_written == self.request.max_tokens:
                    shown += self.text.flush()
                    reason: Any = "stop" if self.text.stopped is not None else "length"
                    self._end(reason, self.text.stopped, shown, ids, values, likeliest)
                else:
                    self.chunks.append(Chunk(self.index, shown, ids, values, likeliest))
            if self.finish_reason is not None:
                self.burst_was_whole = position + 1 == len(tokens)
                return

    def write_nothing(self) -> None:
        """Ends a text of which only the prompt was to be read."""
        self._end("length", None, "")

    def _end(self, reason: FinishReason, stop: int | str | None, text: str, *token: Any) -> None:
        self.finish_reason = reason
        ids, values, likeliest = token or ((), (), ())
        self.chunks.append(Chunk(self.index, text, ids, values, likeliest, reason, stop))
