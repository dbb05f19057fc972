"""Continuous batching: assigns slots to texts and schedules prefill and decode.

A step is a piece of each prompt and one decode call at most, so that a long prompt does not block others: texts join
and leave between steps. Clients with queued texts take turns, and so do prompts in prefill. A scheduler is not
thread-safe: the engine's driver thread alone calls it.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import jax
import numpy as np

from rwkv_jax.inference.engine.adapters import LoadedAdapter, number_of, require_loaded
from rwkv_jax.inference.engine.fair_queue import FairQueue
from rwkv_jax.inference.engine.job import Job, LastBurst, PrefillCursor, TokenTables, UnreadScores
from rwkv_jax.inference.engine.programs import DecodeBurst, SlotState
from rwkv_jax.inference.engine.requests import MAX_TOP_LOGPROBS, NOT_FINITE, NotFiniteError
from rwkv_jax.inference.engine.slot_arrays import Shapes, SlotArrays
from rwkv_jax.inference.sampling.grammar import accept_tokens
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.inference.state.snapshot import Snapshot

_MAX_SHORT_CALLS = 4
"""The rest of a prompt that needs more short calls than this is prefilled in long ones, with padding."""

_MIN_SHARE = 1 / 4
"""Minimum share of used rows in a batched prefill, since padding takes as long."""


class Scheduler:
    """Runs jobs on slots, step by step."""

    def __init__(
        self,
        slots: SlotArrays,
        shapes: Shapes,
        *,
        max_queue: int,
        prefix_cache: PrefixCache | None,
        min_prefix_tokens: int,
    ) -> None:
        """Starts without jobs.

        Args:
          max_queue: jobs that may wait for a slot.
          prefix_cache: cache for states of prompts; None disables it.
          min_prefix_tokens: shorter prompts are not cached.
        """
        self.slots, self._shapes = slots, shapes
        self.max_queue, self._prefix_cache, self._min_prefix_tokens = max_queue, prefix_cache, min_prefix_tokens
        self._queue = FairQueue()
        self._prefilling: collections.deque[Job] = collections.deque()
        self._decoding: list[Job] = []
        self._swapped_out: list[Job] = []  # paused and without slots
        self._unread: collections.deque[UnreadScores] = collections.deque()
        self._was_long = False  # the last prefill
        self.counts: collections.Counter[str] = collections.Counter(
            prompt_tokens=0, cached_tokens=0, prefix_hits=0, prefix_misses=0, generated_tokens=0
        )
        """Numbers since the start, by their names in `EngineStats`."""
        self.mask_seconds = 0.0
        """Seconds in which masks of grammars were computed, since the start."""
        row = slots.empty_row
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves((row.state, row.logits)))
        """Bytes of one snapshot."""
        if prefix_cache is not None and self.state_bytes > prefix_cache.max_bytes:
            self._prefix_cache = None  # not even one state would fit

    # Called by the driver.

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache."""
        return 0 if self._prefix_cache is None else self._prefix_cache.nbytes

    @property
    def num_queued(self) -> int:
        """Number of jobs that wait for a slot."""
        return len(self._queue)

    @property
    def has_batch(self) -> bool:
        """Whether as many jobs wait as a prefill call takes, or as there are slots for."""
        return self.num_queued >= min(self._shapes.short_rows, len(self.slots.free))

    @property
    def num_running(self) -> int:
        """Number of jobs with a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_swapped_out(self) -> int:
        """Number of jobs that wait for their consumers without a slot."""
        return len(self._swapped_out)

    @property
    def room(self) -> int:
        """Number of jobs that may still be queued; 0 while `max_queue` jobs are swapped out for slow consumers."""
        return 0 if len(self._swapped_out) >= self.max_queue else max(0, self.max_queue - self.num_queued)

    def queue(self, jobs: Sequence[Job]) -> None:
        """Queues jobs."""
        for job in jobs:
            self._queue.append(job)

    def remove_abandoned(self) -> None:
        """Ends queued jobs that nobody will collect."""
        self._queue.remove_abandoned()

    def uses(self, adapter: LoadedAdapter) -> bool:
        """Whether a text that has not ended is one of an adapter."""
        jobs = [*self._prefilling, *self._decoding, *self._swapped_out, *self._queue]
        return any(job.request.adapter is adapter for job in jobs)

    def cancel(self, job: Job) -> None:
        """Ends a job at what was collected; no effect on one that has ended."""
        if job.is_done:
            return
        if job in self._swapped_out:
            self._swapped_out.remove(job)
        elif job.slots:
            self._save_state(job)
            self._release(job)
        elif not job.is_only_scored:
            self._queue.remove(job)
        job.end()

    def extend(self, snapshot: Snapshot, ids: Sequence[int], adapter: LoadedAdapter | None = None) -> Snapshot:
        """Prefills some tokens immediately, in a free slot or one borrowed from a text, and returns the state.

        If the device fails, all jobs with a slot end with that error; no job does if `require_loaded` raises.
        """
        require_loaded(adapter)
        try:
            self.slots.repair()
            slot = self.slots.slot_to_borrow
            lender = next((job for job in [*self._prefilling, *self._decoding] if slot in job.slots), None)
            return self.slots.prefilled(snapshot, ids, adapter, lender)
        except BaseException as error:
            self._fail(error)  # the borrowed slot no longer has its text's state
            raise

    def step(self) -> bool:
        """Admits queued texts, prefills a piece of each prompt, and decodes a burst.

        Returns:
          Whether there was anything to do.

        An error caused by one job ends that job. If the device fails, all jobs with a slot end with that error, and
        queued ones continue in new slots; if there can be none, they end with that error too.
        """
        try:
            for job in [*self._prefilling, *self._decoding, *self._swapped_out]:
                if job.is_abandoned:
                    self.cancel(job)
            self._queue.remove_abandoned()
            for job in [job for job in self._swapped_out if not job.is_paused]:
                self._swapped_out.remove(job)
                self._queue.append(job)
            if self.num_queued:
                self.slots.repair()
            admitted = self._admit_queued()
            num_unread = len(self._unread)
            prefilled = self._prefill()
            decoded = self._decode()
            # Those of this step are read in the next one, so that the device need not wait for us.
            for _ in range(num_unread):
                self._read_scores(self._unread[0])
                self._unread.popleft()  # only now: a failure ends all texts that are still in it
            if self._was_long and prefilled and not decoded and not self._unread:
                self.slots.wait()  # calls that run ahead of the device would keep it from prompts that come meanwhile
            return decoded or prefilled or admitted or num_unread > 0
        except BaseException as error:
            self._fail(error)
            return True

    def close(self, error: Exception) -> None:
        """Ends all jobs with an error and frees the slots."""
        for job in [*self._prefilling, *self._decoding, *self._swapped_out, *self._queue, *self._only_scored]:
            job.end(error)
        for jobs in (self._prefilling, self._decoding, self._swapped_out, self._unread):
            jobs.clear()
        self._queue = FairQueue()
        self.slots.release()

    # Join and leave.

    def _admit_queued(self) -> bool:
        admitted, lacks_slots = False, False
        while self.slots.free and not lacks_slots and (job := self._queue.pop(self._is_prefix_in_prefill)) is not None:
            if len(job.cursors) > len(self.slots.free):
                self._queue.put_back(job)
                lacks_slots = True
            else:
                self._admit(job)
                admitted = True
        lacks_slots = lacks_slots or (not self.slots.free and self.num_queued > 0)
        if lacks_slots and not admitted:
            # Swap out a paused text: its state is small and restored exactly.
            paused = next((job for job in self._decoding if job.is_paused), None)
            if paused is not None:
                self._swap_out(paused)
                return self._admit_queued()
        return admitted

    def _is_prefix_in_prefill(self, job: Job) -> bool:
        """Whether another job's prompt that is a prefix of this one's is in prefill and will be cached."""
        if self._prefix_cache is None or job.request.state is not None or job.num_generated:
            return False
        waits_for = job.waits_for
        # Prompts are compared once, not in every step.
        if waits_for not in self._prefilling or waits_for.cursors[0].is_scoring:
            ids = job.request.ids
            job.waits_for = next(
                (
                    other
                    for other in self._prefilling
                    if other.request.state is None
                    and other.request.adapter is job.request.adapter
                    and not other.cursors[0].is_scoring
                    and self._min_prefix_tokens <= len(other.request.ids) <= len(ids)
                    and ids[: len(other.request.ids)] == other.request.ids
                ),
                None,
            )
        return job.waits_for is not None

    def _admit(self, job: Job) -> None:
        self._prefilling.append(job)  # before the device call, so that its failure also ends this text
        job.snapshot = job.last_burst = None  # from when it was swapped out
        try:
            tables = job.tables()
            for cursor in job.cursors:
                row = cursor.saved or self._first_row(job, cursor, tables)
                cursor.slot = self.slots.free.pop()
                self.slots.put(cursor.slot, row, tables.bias, tables.stops, cursor.adapter)
                cursor.saved = None
        except Exception as error:
            if self.slots.are_deleted:
                raise
            self._finish(job, error)  # the request's fault, such as a deleted state
            return
        if not job.is_prefilling:
            self._start_decoding(job)

    def _first_row(self, job: Job, cursor: PrefillCursor, tables: TokenTables) -> SlotState:
        """Initial state of a text: its request's state, or that after the longest cached prefix of its prompt."""
        state = job.request.state
        if state is not None:
            return SlotState(state.state, state.logits, tables.occurrences)
        if self._prefix_cache is not None:
            prompt = cursor.ids[: cursor.prompt_length]
            found = self._prefix_cache.lookup(prompt, number_of(cursor.adapter))
            if found is not None and found[1].owner == self.slots.owner_of(cursor.adapter):
                cursor.num_prefilled, prefix = found
                self.counts.update(cached_tokens=cursor.num_prefilled, prefix_hits=1)
                if cursor is job.cursors[0]:
                    job.num_cached = cursor.num_prefilled
                return SlotState(prefix.state, prefix.logits, tables.occurrences)
            self.counts["prefix_misses"] += 1
            shared = self._prefix_cache.shared_prefix_length(prompt, number_of(cursor.adapter))
            cursor.shared_prefix_length = shared if shared >= self._min_prefix_tokens else 0
        return SlotState(self.slots.empty_row.state, self.slots.empty_row.logits, tables.occurrences)

    def _start_decoding(self, job: Job) -> None:
        self._prefilling.remove(job)
        if job.is_only_scored:
            self._release(job)
        elif job.request.max_tokens == 0:
            job.end_after_prefill()
            self._save_state(job)
            self._finish(job)
        else:
            self._decoding.append(job)

    def _finish(self, job: Job, error: Exception | None = None) -> None:
        self._release(job)
        job.end(error)

    def _release(self, job: Job) -> None:
        if job in self._prefilling:
            self._prefilling.remove(job)
        if job in self._decoding:
            self._decoding.remove(job)
        self.slots.free += job.slots
        for cursor in job.cursors:
            cursor.slot = None

    def _swap_out(self, job: Job) -> None:
        for cursor in job.cursors:
            assert cursor.slot is not None
            cursor.saved = self.slots.row(cursor.slot)
        self._save_state(job)
        self._release(job)
        self._swapped_out.append(job)

    def _fail(self, error: BaseException) -> None:
        """Ends all jobs with a slot. The slots are allocated anew when needed."""
        reason = (
            error if isinstance(error, Exception) else RuntimeError("interrupted while this text was being generated")
        )
        if self.slots.is_broken:  # there are no slots to be had
            for job in self._queue:
                job.end(reason)
            self._queue = FairQueue()
        for job in [*self._prefilling, *self._decoding, *self._only_scored]:
            for cursor in job.cursors:
                cursor.slot = None
            job.end(reason)
        for jobs in (self._prefilling, self._decoding, self._unread):
            jobs.clear()
        self.slots.is_broken = True

    # States of finished texts.

    def _save_state(self, job: Job) -> None:
        """Extracts the states that a job's consumer may request: now, and before the last burst."""
        if not job.request.return_state or job.is_prefilling:
            return
        cursor = job.cursors[0]
        job.snapshot, job.last_burst = None, None
        if job.burst_was_used_up:
            job.snapshot = self.slots.snapshot_of(cursor, job.num_tokens)
        # Not needed if all chunks are collected; and a text just swapped in has no burst in its slot yet.
        if job.burst and (job.chunks or not job.burst_was_used_up):
            before = self.slots.snapshot_of(cursor, job.num_tokens - len(job.burst), before_burst=True)
            job.last_burst = LastBurst(before, tuple(job.burst))

    # Prefill.

    def _prefill(self) -> bool:
        """Prefills, in turn, a long piece of the next long prompt, and a short piece of each of the others."""
        cursors = {cursor: job for job in self._prefilling for cursor in job.cursors if cursor.remaining}
        if not cursors:
            return False
        shapes = self._shapes
        max_short = _MAX_SHORT_CALLS * shapes.short
        short = [cursor for cursor in cursors if cursor.next_remaining <= max_short]
        self._was_long = len(short) < len(cursors) and not (short and self._was_long)
        if self._was_long:
            cursor = next(cursor for cursor in cursors if cursor.next_remaining > max_short)
            self._prefill_rows([(cursor, min(cursor.next_remaining, shapes.long))], shapes.long, alone=True)
            self._prefilling.remove(cursors[cursor])
            self._prefilling.append(cursors[cursor])
        else:
            prompts = [cursor for cursor in short if not cursor.is_scoring]
            scored = [cursor for cursor in short if cursor.is_scoring]
            for own in (prompts, scored):
                pieces = [(cursor, min(cursor.next_remaining, shapes.short)) for cursor in own]
                while pieces:
                    alone = not shapes.always_batched and len(pieces) <= max(1, _MIN_SHARE * shapes.short_rows)
                    count = 1 if alone else shapes.short_rows
                    self._prefill_rows(pieces[:count], shapes.short, alone=alone)
                    pieces = pieces[count:]
        for job in [job for job in self._prefilling if not job.is_prefilling]:
            self._start_decoding(job)
        return True

    def _prefill_rows(self, pieces: Sequence[tuple[PrefillCursor, int]], length: int, *, alone: bool) -> None:
        """Prefills pieces of prompts, or scores pieces that are all scored."""
        self.counts["prompt_tokens"] += sum(size for _, size in pieces)
        if pieces[0][0].is_scoring:
            jobs = [next(job for job in self._prefilling if cursor in job.cursors) for cursor, _ in pieces]
            num_top = MAX_TOP_LOGPROBS if any(job.request.top_logprobs for job in jobs) else 0
            scores, rows = self.slots.score(pieces, length, alone=alone, num_top=num_top)
            self._unread.append(UnreadScores(scores, list(zip(jobs, rows, (size for _, size in pieces), strict=True))))
            return
        to_cache = [cursor for cursor, size in pieces if self._is_worth_caching(cursor, size)]
        wants_logits = bool(to_cache) or any(
            cursor.num_prefilled + size == cursor.prompt_length for cursor, size in pieces
        )
        self.slots.prefill(pieces, length, alone=alone, wants_logits=wants_logits)
        for cursor in to_cache:
            assert self._prefix_cache is not None
            snapshot = self.slots.snapshot_of(cursor, cursor.num_prefilled)
            self._prefix_cache.put(cursor.ids[: cursor.num_prefilled], snapshot, number_of(cursor.adapter))

    def _is_worth_caching(self, cursor: PrefillCursor, size: int) -> bool:
        """Whether to cache the state after `size` more tokens: at a prompt's end, or where it diverges from another."""
        if self._prefix_cache is None or not any(
            cursor in job.cursors and job.request.state is None for job in self._prefilling
        ):
            return False
        end = cursor.num_prefilled + size
        return end >= self._min_prefix_tokens and end in (cursor.prompt_length, cursor.shared_prefix_length)

    @property
    def _only_scored(self) -> list[Job]:
        """Jobs without a slot whose last scores are not read yet."""
        jobs = [job for unread in self._unread for job, *_ in unread.pieces]
        return [job for job in jobs if job.is_only_scored and not job.is_done]

    def _read_scores(self, unread: UnreadScores) -> None:
        """Waits for the scores of a call, and ends the texts of which they were the last."""
        for job, scores in unread.read():
            if job.is_done:
                continue
            if not np.isfinite(scores.logprobs).all():
                self._finish(job, NotFiniteError(NOT_FINITE))
            elif job.add_scores(scores):
                job.end()

    # Decode.

    def _decode(self) -> bool:
        """Decodes a burst of every text that is not paused, in the smallest batch that fits."""
        jobs = [job for job in self._decoding if not job.is_paused]
        if not jobs:
            return False
        num_top = MAX_TOP_LOGPROBS if any(job.request.top_logprobs for job in jobs) else 0
        errors: dict[Job, Exception] = {}
        burst, row_of_slot = self.slots.decode(jobs, num_top, lambda tokens: errors.update(self._next_masks(tokens)))
        for job in jobs:
            self._add_burst(job, burst, row_of_slot[job.slots[0]], errors.get(job))
        return True

    def _next_masks(self, tokens: dict[Job, int]) -> dict[Job, Exception]:
        """Computes the masks that follow these tokens; errors of the texts that cannot go on."""
        start = time.perf_counter()
        constraints = {job: job.constraint for job in tokens if job.constraint is not None}
        errors = accept_tokens(list(constraints.values()), list(tokens.values()))
        self.mask_seconds += time.perf_counter() - start
        return {job: error for job, error in zip(constraints, errors, strict=True) if error is not None}

    def _add_burst(self, job: Job, burst: DecodeBurst, row: int, error: Exception | None) -> None:
        size = int(burst.counts[row])
        logprobs = burst.logprobs[:size, row]
        if np.isnan(logprobs).any():
            error = NotFiniteError(NOT_FINITE)  # rather than that its grammar allows no such token
        if error is not None:
            self._finish(job, error)
            return
        num_top = job.request.top_logprobs
        ids, values = (x[:size, row, :num_top].tolist() for x in (burst.top_tokens, burst.top_logprobs))
        top = [tuple(zip(*of_token, strict=True)) for of_token in zip(ids, values, strict=True)] if num_top else []
        try:
            job.add_burst(burst.tokens[:size, row].tolist(), logprobs.tolist(), top)
            self.counts["generated_tokens"] += len(job.burst)
        except Exception as error:  # such as its tokenizer's error: ends only this job
            self._finish(job, error)
            return
        if job.finish_reason is not None:
            self._save_state(job)
            self._finish(job)
        else:
            job.news.announce()
