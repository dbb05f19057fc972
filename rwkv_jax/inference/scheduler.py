"""Continuous batching: which texts hold the slots, and what the device does next.

A tick is at most one call that reads prompts and one that writes, so that a long prompt holds nobody up: texts join and
leave between ticks. Waiting clients take turns, and so do prompts that are being read. One thread at a time may use a
scheduler; the engine's lock sees to that.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rwkv_jax.inference.job import Job, Reader, Tables, Tail
from rwkv_jax.inference.prefix_store import PrefixStore
from rwkv_jax.inference.programs import Burst, Draw, Mark, Programs, Row, Slots, pad
from rwkv_jax.inference.requests import MOST_TOP_LOG_PROBABILITIES, QueueFullError
from rwkv_jax.inference.sampling import settings_of
from rwkv_jax.inference.snapshot import Snapshot

_SHORT_CALLS = 4
"""Calls of the short kind that are worth more than one long call that is mostly padding."""

_LEAST_SHARE = 1 / 4
"""Of a call's rows that several prompts must pass to be read together: padding takes as long as they do."""


class NotFiniteError(FloatingPointError):
    """The model's logits are not finite."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes for which programs are compiled."""

    batch_sizes: tuple[int, ...]
    """Rows that are written at once, ascending; the last is the number of slots."""
    long: int
    """Tokens of one prompt that are read in one call."""
    short: int
    """Tokens of each of several prompts, or of one's rest, that are read in one call."""
    short_rows: int
    """Prompts of which such a call reads; all slots in order, if there are no more."""


class Scheduler:
    """Runs jobs on slots, a tick at a time."""

    def __init__(
        self,
        programs: Programs,
        shapes: Shapes,
        *,
        most_waiting: int,
        prefixes: PrefixStore | None,
        fewest_prefix_tokens: int,
    ) -> None:
        """Allocates the slots.

        Args:
          most_waiting: jobs that may wait for a slot.
          prefixes: where states of prompts are kept and found; None keeps none.
          fewest_prefix_tokens: shorter prompts are not kept.
        """
        self._programs, self._shapes = programs, shapes
        self._most_waiting, self._prefixes, self._fewest_prefix_tokens = most_waiting, prefixes, fewest_prefix_tokens
        self._waiting: dict[str, collections.deque[Job]] = {}
        self._reading: collections.deque[Job] = collections.deque()
        self._writing: list[Job] = []
        self._away: list[Job] = []  # gave their slots up while their readers paused
        self._is_in_turn = False
        self.params = programs.params
        self._owner = programs.checksum().hex()
        self._allocate()
        self.empty_row = self._row(self._slots, 0)
        """The row of a text that has not begun."""
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves((self.empty_row.state, self.empty_row.logits)))
        """Of one snapshot."""
        if prefixes is not None and self.state_bytes > prefixes.max_bytes:
            self._prefixes = None  # not one of its states would fit

    def _allocate(self) -> None:
        self._free = list(range(self._programs.num_slots))[::-1]
        self._slots, self._mark = self._programs.make(self.params)

    # What the engine calls.

    @property
    def owner(self) -> str:
        """Checksum of the model's parameters, by which its snapshots are told from others."""
        return self._owner

    @property
    def is_in_turn(self) -> bool:
        """Whether the slots are being changed: asked, under the lock, by a finalizer that runs in the midst of it."""
        return self._is_in_turn

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a slot."""
        return sum(len(jobs) for jobs in self._waiting.values())

    @property
    def room(self) -> int:
        """Jobs that may still be submitted; none while as many as may wait gave their slots up for slow readers."""
        return 0 if len(self._away) >= self._most_waiting else max(0, self._most_waiting - self.num_waiting)

    @property
    def num_running(self) -> int:
        """Jobs with a slot."""
        return len(self._reading) + len(self._writing)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Lets jobs wait for slots, all of them or none.

        Raises:
          QueueFullError: more than `most_waiting` would wait.
        """
        with self._turn():
            for queue in self._waiting.values():
                for job in [job for job in queue if job.is_abandoned]:
                    queue.remove(job)
                    job.is_done = True
            if len(jobs) > self.room:
                away = f" ({len(self._away)} others are half collected)" if self._away else ""
                raise QueueFullError(
                    f"queue: {self.num_waiting} texts wait{away}, and {len(jobs)} more would pass most_waiting = "
                    f"{self._most_waiting}; collect some first, or build the engine with more"
                )
            for job in jobs:
                self._wait_for_slot(job)

    def cancel(self, job: Job) -> None:
        """Ends a job at what its reader has collected of it; others go on. In a turn it is marked, and ends later."""
        if job.is_done:
            return
        if self._is_in_turn:
            job.is_abandoned = True
        else:
            with self._turn():
                self._cancel(job)

    def read_on(self, snapshot: Snapshot, ids: Sequence[int]) -> Snapshot:
        """The state after some tokens more, at once: in a slot that is free, or lent by a text for the moment.

        Where the device fails, all jobs with a slot end with that error.
        """
        with self._turn():
            slot = self._free[-1] if self._free else 0
            lender = next((job for job in [*self._reading, *self._writing] if slot in job.slots), None)
            lent = self._row(self._slots, slot)
            nothing = np.zeros(self._programs.vocab_size, np.float32)
            reader = Reader(tuple(ids), slot=slot)
            try:
                self._put(slot, Row(snapshot.state, snapshot.logits, nothing), nothing, nothing > 0)
                while reader.remaining:
                    piece = (reader, min(reader.remaining, self._shapes.short))
                    self._read_rows([piece], self._shapes.short, alone=True)
                state = self._snapshot(self._row(self._slots, slot), snapshot.num_tokens + len(ids))
                if lender is not None:
                    tables = lender.tables()
                    self._put(slot, lent, tables.bias, tables.stops)
            except BaseException as error:
                self._fail(error)  # whatever the lender's slot holds now, it is not its text
                raise
            return state

    def tick(self) -> bool:
        """One turn: texts join, a prompt is read on, texts are written on.

        Returns:
          Whether there was anything to do.

        An error that one job has caused is that job's. Where the device fails, or the turn is interrupted, all jobs
        with a slot end with that error, and those that wait go on in new slots.
        """
        with self._turn():
            try:
                for job in [*self._reading, *self._writing, *self._away]:
                    if job.is_abandoned:
                        self._cancel(job)
                for job in [job for job in self._away if not job.is_paused]:
                    self._away.remove(job)
                    self._wait_for_slot(job)
                joined = self._join()
                read = self._read()
                return self._write() or read or joined
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
                return True

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """In which nobody else changes slots: a thread's own finalizers may run at any moment, lock or no lock."""
        if self._is_in_turn:
            raise RuntimeError("the engine is in the midst of a turn: a finalizer (`__del__`) cannot run it")
        self._is_in_turn = True
        try:
            yield
        finally:
            self._is_in_turn = False

    # Joining and leaving.

    def _wait_for_slot(self, job: Job) -> None:
        self._waiting.setdefault(job.request.client, collections.deque()).append(job)

    def _wait_in_front(self, job: Job) -> None:
        client = job.request.client
        queue = self._waiting.pop(client, collections.deque())
        queue.appendleft(job)
        self._waiting = {client: queue} | self._waiting

    def _cancel(self, job: Job) -> None:
        if job in self._away:
            self._away.remove(job)
        elif job.slots:
            self._keep(job)
            self._release(job)
        else:
            self._waiting[job.request.client].remove(job)
        job.is_done = True

    def _join(self) -> bool:
        joined, lacks_slots = False, False
        while self._free and not lacks_slots and (job := self._next_job()) is not None:
            if job.is_abandoned:
                job.is_done = True
            elif len(job.readers) > len(self._free):
                self._wait_in_front(job)
                lacks_slots = True
            else:
                self._admit(job)
                joined = True
        lacks_slots = lacks_slots or (not self._free and self.num_waiting > 0)
        if lacks_slots and not joined:
            # A text whose reader pauses makes room: its state is small, and comes back as it was.
            paused = next((job for job in self._writing if job.is_paused), None)
            if paused is not None:
                self._send_away(paused)
                return self._join()
        return joined

    def _next_job(self) -> Job | None:
        """The first job of the client whose turn it is, but for those that had better wait for another's prompt."""
        for client, queue in list(self._waiting.items()):
            job = next((job for job in queue if not self._is_being_read(job)), None)
            if job is None and queue:
                continue
            del self._waiting[client]
            if job is not None:
                queue.remove(job)
                if queue:
                    self._waiting[client] = queue  # behind the others
                return job
        return None

    def _is_being_read(self, job: Job) -> bool:
        """Whether someone is reading a prompt that will be of use to this job."""
        if self._prefixes is None or job.request.start is not None or job.num_written:
            return False
        if job.waits_for not in self._reading:  # prompts are compared once, not at every turn
            ids = job.request.ids
            job.waits_for = next(
                (
                    other
                    for other in self._reading
                    if other.request.start is None
                    and self._fewest_prefix_tokens <= len(other.request.ids) <= len(ids)
                    and ids[: len(other.request.ids)] == other.request.ids
                ),
                None,
            )
        return job.waits_for is not None

    def _admit(self, job: Job) -> None:
        self._reading.append(job)  # before the device is asked, so that what fails there is this text's failure too
        job.snapshot = job.tail = None  # of when it gave its slot up
        try:
            tables = job.tables()
            for reader in job.readers:
                row = reader.row or self._first_row(job, reader, tables)
                reader.slot = self._free.pop()
                self._put(reader.slot, row, tables.bias, tables.stops)
                reader.row = None
        except Exception as error:
            if any(x.is_deleted() for x in jax.tree.leaves(self._slots)):
                raise
            self._finish(job, error)  # what it brought along is at fault, a state that was deleted, say
            return
        if not job.is_reading:
            self._start_writing(job)

    def _put(self, slot: int, row: Row, bias: Any, stops: Any) -> None:
        # It may come from the host, or from other devices, if an engine of the same weights made it there.
        row = jax.device_put(row, jax.tree.map(lambda x: x.sharding, self.empty_row))
        self._slots = self._programs.put(self._slots, np.int32(slot), row, bias, stops)

    def _first_row(self, job: Job, reader: Reader, tables: Tables) -> Row:
        """Where a text begins: at its request's state, or at the longest beginning of its prompt that is known."""
        start = job.request.start
        if start is not None:
            return Row(start.state, start.logits, tables.occurrences)
        if self._prefixes is not None:
            found = self._prefixes.longest(reader.ids)
            if found is not None and found[1].owner == self._owner:
                reader.num_read, prefix = found
                return Row(prefix.state, prefix.logits, tables.occurrences)
            parting = self._prefixes.parting(reader.ids)
            reader.parting = parting if parting >= self._fewest_prefix_tokens else 0
        return Row(self.empty_row.state, self.empty_row.logits, tables.occurrences)

    def _start_writing(self, job: Job) -> None:
        self._reading.remove(job)
        if job.request.max_tokens == 0:
            job.write_nothing()
            self._keep(job)
            self._finish(job)
        else:
            self._writing.append(job)

    def _finish(self, job: Job, error: Exception | None = None) -> None:
        """Takes a job's slots from it for good."""
        self._release(job)
        job.error, job.is_done = error, True

    def _release(self, job: Job) -> None:
        if job in self._reading:
            self._reading.remove(job)
        if job in self._writing:
            self._writing.remove(job)
        self._free += job.slots
        for reader in job.readers:
            reader.slot = None

    def _send_away(self, job: Job) -> None:
        for reader in job.readers:
            assert reader.slot is not None
            reader.row = self._row(self._slots, reader.slot)
        self._keep(job)
        self._release(job)
        self._away.append(job)

    def _fail(self, error: BaseException) -> None:
        reason = (
            error if isinstance(error, Exception) else RuntimeError("interrupted while this text was being written")
        )
        for job in [*self._reading, *self._writing]:
            job.error, job.is_done = reason, True
            for reader in job.readers:
                reader.slot = None
        self._reading.clear()
        self._writing.clear()
        self._allocate()

    # States on their way out.

    def _row(self, source: Slots | Mark, slot: int) -> Row:
        return self._programs.take(source.state, source.logits, self._slots.occurrences, np.int32(slot))

    def _snapshot(self, row: Row, num_tokens: int) -> Snapshot:
        return Snapshot(row.state, row.logits, num_tokens, self._owner)

    def _keep(self, job: Job) -> None:
        """Takes out what a job's reader may ask for: the state now, and before the last burst."""
        if not job.request.keep or job.is_reading:
            return
        reader = job.readers[0]
        assert reader.slot is not None
        job.snapshot, job.tail = None, None
        if job.burst_was_whole:
            job.snapshot = self._snapshot(reader.row or self._row(self._slots, reader.slot), job.num_tokens)
        # All that was written may have been collected; a text that came back then has no burst in its new slot yet.
        if job.burst and (job.chunks or not job.burst_was_whole):
            before = self._snapshot(self._row(self._mark, reader.slot), job.num_tokens - len(job.burst))
            job.tail = Tail(before, tuple(job.burst))

    # Reading.

    def _read(self) -> bool:
        """Reads on: a long piece of the prompt whose turn it is, or a short piece of each that has no long one."""
        readers = [reader for job in self._reading for reader in job.readers if reader.remaining]
        if not readers:
            return False
        shapes = self._shapes
        reader = readers[0]
        most = _SHORT_CALLS * shapes.short
        if reader.next_remaining > most:
            self._read_rows([(reader, min(reader.next_remaining, shapes.long))], shapes.long, alone=True)
        else:
            short = [reader for reader in readers if reader.next_remaining <= most]
            pieces = [(reader, min(reader.next_remaining, shapes.short)) for reader in short]
            while pieces:
                alone = len(pieces) <= max(1, _LEAST_SHARE * shapes.short_rows)
                count = 1 if alone else shapes.short_rows
                self._read_rows(pieces[:count], shapes.short, alone=alone)
                pieces = pieces[count:]
        self._reading.rotate(-1)
        for job in [job for job in self._reading if not job.is_reading]:
            self._start_writing(job)
        return True

    def _read_rows(self, pieces: Sequence[tuple[Reader, int]], length: int, *, alone: bool) -> None:
        num_rows, num_slots = 1 if alone else self._shapes.short_rows, self._programs.num_slots
        slots = [reader.slot for reader, _ in pieces]
        rows = None if num_rows == num_slots else pad(slots, num_rows, num_slots, np.int32)
        tokens = np.zeros((num_rows, length), np.int32)
        lengths = np.zeros(num_rows, np.int32)
        for place, (reader, size) in enumerate(pieces):
            assert reader.slot is not None
            row = reader.slot if rows is None else place
            tokens[row, :size] = reader.ids[reader.num_read : reader.num_read + size]
            lengths[row] = size
        ends = any(reader.remaining == size for reader, size in pieces)
        kept = [reader for reader, size in pieces if self._is_worth_keeping(reader, size)]
        self._slots = self._programs.read(self.params, self._slots, rows, tokens, lengths, np.bool_(ends or bool(kept)))
        for reader, size in pieces:
            reader.num_read += size
        for reader in kept:
            assert self._prefixes is not None
            assert reader.slot is not None
            snapshot = self._snapshot(self._row(self._slots, reader.slot), reader.num_read)
            self._prefixes.put(reader.ids[: reader.num_read], snapshot)

    def _is_worth_keeping(self, reader: Reader, size: int) -> bool:
        """Whether the state after `size` more tokens is stored: at a prompt's end, or where it parts from another."""
        if self._prefixes is None or not any(
            reader in job.readers and job.request.start is None for job in self._reading
        ):
            return False
        num_tokens = reader.num_read + size
        return num_tokens >= self._fewest_prefix_tokens and (reader.remaining == size or reader.parting == num_tokens)

    # Writing.

    def _write(self) -> bool:
        """Writes on in every text that does not wait for its reader."""
        jobs = [job for job in self._writing if not job.is_paused]
        if not jobs:
            return False
        jobs, rows, draw = self._rows_to_write(jobs)
        num_top = MOST_TOP_LOG_PROBABILITIES if any(job.request.num_top for job in jobs) else 0
        self._slots, self._mark, burst = self._programs.write(
            self.params,
            self._slots,
            self._mark,
            rows,
            draw,
            num_top=num_top,
        )
        burst: Burst = jax.device_get(burst)
        places = {slot: place for place, slot in enumerate(range(self._programs.num_slots) if rows is None else rows)}
        for job in jobs:
            self._take_burst(job, burst, places[job.slots[0]])
        return True

    def _rows_to_write(self, jobs: list[Job]) -> tuple[list[Job], np.ndarray | None, Draw]:
        """The rows of the next burst: all slots in order, or the fewest that are compiled for and hold these jobs."""
        num_slots = self._programs.num_slots
        used = [slot for job in jobs for slot in job.slots]
        size = next(size for size in self._shapes.batch_sizes if size >= len(used))
        rows = None if size == num_slots else pad(used, size, num_slots, np.int32)
        places = {slot: slot if rows is None else place for place, slot in enumerate(used)}
        draws: dict[int, tuple[Job, int, int]] = {}  # place -> job, its leader, what guides it
        for job in jobs:
            own, *others = (places[slot] for slot in job.slots)
            draws[own] = (job, own, others[0] if others else own)
            draws |= {other: (job, own, other) for other in others}
        positions, allowed = np.zeros(size, np.int32), np.zeros(size, np.int32)
        seeds, guidance = np.zeros(size, np.uint32), np.ones(size, np.float32)
        leader, guide = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)
        samplings = [jobs[0].request.sampling] * size
        for place, (job, own, other) in draws.items():
            samplings[place], seeds[place] = job.request.sampling, job.request.seed
            # (The key of a draw takes a position of 31 bits.)
            positions[place] = job.num_tokens % 2**31
            allowed[place] = min(job.request.max_tokens - job.num_written, self._programs.burst_length)
            leader[place], guide[place] = own, other
            guidance[place] = job.request.guidance if place == own else 1
        return jobs, rows, Draw(settings_of(samplings), seeds, positions, allowed, leader, guide, guidance)

    def _take_burst(self, job: Job, burst: Burst, place: int) -> None:
        size = int(burst.counts[place])
        values = burst.log_probabilities[:size, place]
        if np.isnan(values).any():
            broken = (
                "the model's logits are not finite: its weights are broken, or the state from which this text went on"
            )
            self._finish(job, NotFiniteError(broken))
            return
        num_top = job.request.num_top
        top = [
            tuple(zip(ids.tolist(), likely.tolist(), strict=True))
            for ids, likely in zip(
                burst.top_tokens[:size, place, :num_top],
                burst.top_log_probabilities[:size, place, :num_top],
                strict=True,
            )
        ]
        try:
            job.write(burst.tokens[:size, place].tolist(), values.tolist(), top if num_top else ())
        except Exception as error:  # its tokenizer's, say: nobody else's business
            self._finish(job, error)
            return
        if job.finish_reason is not None:
            self._keep(job)
            self._finish(job)
