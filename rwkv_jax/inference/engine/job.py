"""A text in the engine: what is left to prefill and what was generated."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.inference.engine.adapters import LoadedAdapter
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.programs import DecodeParams, SlotState
from rwkv_jax.inference.engine.requests import Chunk, FinishReason, Request
from rwkv_jax.inference.engine.scoring import TokenScores
from rwkv_jax.inference.engine.text import TextStream
from rwkv_jax.inference.sampling.choose import stack_settings
from rwkv_jax.inference.sampling.grammar import Constraint
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot


@dataclasses.dataclass(eq=False)
class PrefillCursor:
    """Prefill progress of a slot with the prompt or negative prompt."""

    ids: tuple[int, ...]
    """Tokens to prefill."""
    num_scored: int = 0
    """Of these, at their end, tokens that are scored while they are read."""
    saved: SlotState | None = None
    """The slot's content when it was swapped out; None otherwise."""
    num_prefilled: int = 0
    """Number of prefilled `ids`."""
    slot: int | None = None
    """Slot index; None without a slot."""
    adapter: LoadedAdapter | None = None
    """Of its text; None for the base alone."""
    shared_prefix_length: int = 0
    """Number of `ids` shared with another known prompt: the state there is worth caching."""

    @property
    def prompt_length(self) -> int:
        """Number of `ids` that are not scored."""
        return len(self.ids) - self.num_scored

    @property
    def is_scoring(self) -> bool:
        """Whether the next token is scored."""
        return self.num_scored > 0 and self.num_prefilled >= self.prompt_length

    @property
    def next_remaining(self) -> int:
        """Tokens left until the next state to cache, the first scored token, or the end."""
        ends = (self.shared_prefix_length, self.prompt_length, len(self.ids))
        return next((end for end in ends if end > self.num_prefilled), len(self.ids)) - self.num_prefilled

    @property
    def remaining(self) -> int:
        """Tokens left to prefill."""
        return len(self.ids) - self.num_prefilled


class TokenTables(NamedTuple):
    """Per-token inputs of a slot, [V] each; see `programs.Slots`."""

    occurrences: NDArray[np.float32]
    bias: NDArray[np.float32]
    stops: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class LastBurst:
    """The last burst of a text: the state before it, and its tokens."""

    before: Snapshot
    ids: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Job:
    """A request and its progress. The engine's thread changes it; its consumer takes chunks out and abandons it."""

    request: Request
    index: int
    """Index of the prompt in the call."""
    cursors: list[PrefillCursor]
    """Prefill of the text and, if there is one, of the negative prompt."""
    tables: Callable[[], TokenTables]
    """Creates the per-token inputs of its slots."""
    text: TextStream
    news: News
    """Where its consumer learns of chunks and of the end."""
    constraint: Constraint | None = None
    """What its next token may be; None for any token."""
    max_pending_chunks: int | None = None
    """Uncollected chunks at which it pauses; None for texts collected as a whole."""
    waits_for: Job | None = None
    """A job in prefill whose prompt is a prefix of this one's."""
    chunks: collections.deque[Chunk] = dataclasses.field(default_factory=collections.deque)
    """Chunks generated and not yet collected."""
    scores: list[TokenScores] = dataclasses.field(default_factory=list)
    """Of its scored tokens, piece by piece, each without a row axis."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache spared it."""
    num_generated: int = 0
    """Tokens generated, including a stop token."""
    burst: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the last burst that belong to the text, including a stop token."""
    burst_was_used_up: bool = True
    """Whether the slot has read only `burst` since the burst began."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    is_abandoned: bool = False
    """Nobody will collect it; set at any time when the stream is dropped."""
    is_done: bool = False
    """Finished, rejected, cancelled or failed: it has no slot and generates nothing more."""
    snapshot: Snapshot | None = None
    """The state after all generated tokens, for requests with `return_state`."""
    last_burst: LastBurst | None = None
    """Data to compute the state after an earlier token of the last burst."""

    @property
    def is_prefilling(self) -> bool:
        """Whether any prompt token is left."""
        return any(cursor.remaining for cursor in self.cursors)

    @property
    def is_only_scored(self) -> bool:
        """Whether all was read to be scored, so that it needs no slot any more."""
        return bool(self.request.scored_ids) and not self.is_prefilling

    @property
    def slots(self) -> list[int]:
        """The slots it holds."""
        return [cursor.slot for cursor in self.cursors if cursor.slot is not None]

    @property
    def has_begun(self) -> bool:
        """Whether it has left the queue before."""
        return self.is_done or bool(self.slots) or self.num_generated > 0 or self.is_only_scored

    @property
    def is_paused(self) -> bool:
        """Whether it waits for its consumer.

        With `return_state` the state must stay within one burst of what was collected; other streams are bounded to
        limit the memory of uncollected chunks.
        """
        limit = self.pending_limit
        return limit is not None and len(self.chunks) >= limit

    @property
    def pending_limit(self) -> int | None:
        """Uncollected chunks at which it pauses; None for no limit."""
        return 1 if self.request.return_state else self.max_pending_chunks

    @property
    def num_tokens(self) -> int:
        """Tokens read by its slot since the text began."""
        before = 0 if self.request.state is None else self.request.state.num_tokens
        return before + self.cursors[0].num_prefilled + self.num_generated

    def add_burst(
        self, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[tuple[tuple[int, float], ...]]
    ) -> None:
        """Appends a burst's tokens, up to where the text ends."""
        self.burst, self.burst_was_used_up = [], True
        for position, token in enumerate(tokens):
            self.num_generated += 1
            self.burst.append(token)
            if token in self.request.stop_ids:
                self._end("stop", token, self.text.flush())
            else:
                shown = self.text.push(token)
                of_token = ((token,), (logprobs[position],), tuple(top[position : position + 1]))
                if self.text.stopped is not None:
                    self._end("stop", self.text.stopped, shown, *of_token)
                elif self.num_generated == self.request.max_tokens:
                    shown += self.text.flush()
                    reason: FinishReason = "stop" if self.text.stopped is not None else "length"
                    self._end(reason, self.text.stopped, shown, *of_token)
                else:
                    self.chunks.append(Chunk(self.index, shown, *of_token))
            if self.finish_reason is not None:
                self.burst_was_used_up = position + 1 == len(tokens)
                return

    def end(self, error: Exception | None = None) -> None:
        """Marks it as done, by an error if given, once its last chunk is there."""
        self.error, self.is_done = error, True
        self.news.announce()

    def add_scores(self, scores: TokenScores) -> bool:
        """Appends the scores of a piece; whether it was the last one, which ends it."""
        self.scores.append(scores)
        if sum(len(part.logprobs) for part in self.scores) < len(self.request.scored_ids):
            return False
        self.end_after_prefill()
        return True

    def end_after_prefill(self) -> None:
        """Ends a text that only needed prefill."""
        self._end("length", None, "")

    def _end(
        self,
        reason: FinishReason,
        stop: int | str | None,
        text: str,
        ids: tuple[int, ...] = (),
        logprobs: tuple[float, ...] = (),
        top: tuple[Any, ...] = (),
    ) -> None:
        self.finish_reason = reason
        self.chunks.append(Chunk(self.index, text, ids, logprobs, top, reason, stop))


class UnreadScores(NamedTuple):
    """Scores of a call that the device may not have computed yet."""

    scores: TokenScores
    pieces: Sequence[tuple[Job, int, int]]
    """Job, row and number of tokens of each piece."""

    def read(self) -> Iterator[tuple[Job, TokenScores]]:
        """Waits for the scores; those of each job, without a row axis."""
        scores: TokenScores = jax.device_get(self.scores)
        for job, row, size in self.pieces:
            top = job.request.top_logprobs
            yield job, TokenScores(*(x[row, :size, :top] if x.ndim == 3 else x[row, :size] for x in scores))


def decode_params(
    jobs: Sequence[Job], row_of_slot: Mapping[int, int], num_rows: int, burst_length: int
) -> DecodeParams:
    """How the rows of a burst are decoded; rows without a job are left untouched."""
    positions, max_tokens = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    seeds, guidance_scale = np.zeros(num_rows, np.uint32), np.ones(num_rows, np.float32)
    token_row, negative_row = np.arange(num_rows, dtype=np.int32), np.arange(num_rows, dtype=np.int32)
    samplings = [jobs[0].request.sampling if jobs else SamplingParams()] * num_rows
    for job in jobs:
        own, *_ = rows = [row_of_slot[slot] for slot in job.slots]
        for row in rows:
            samplings[row], seeds[row] = job.request.sampling, job.request.seed
            positions[row] = job.num_tokens % 2**31  # random keys take 31 bits
            max_tokens[row] = min(job.request.max_tokens - job.num_generated, burst_length)
            token_row[row] = own
        negative_row[own], guidance_scale[own] = rows[-1], job.request.guidance_scale
    settings = stack_settings(samplings)
    return DecodeParams(settings, seeds, positions, max_tokens, token_row, negative_row, guidance_scale)
