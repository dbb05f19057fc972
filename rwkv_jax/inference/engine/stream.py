"""Streams of chunks for `for` and `async for`, cancellable at any token."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from threading import Lock, RLock
from types import FrameType, TracebackType
from typing import Self

from rwkv_jax.inference.engine.job import Job
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.inference.state.snapshot import Snapshot


class Stream:
    """Chunks of one or several texts, in the order of generation.

    Waiting for a chunk runs the engine for all texts until there is one: there is no background thread. Streams of one
    engine may be consumed by any threads and tasks, each stream by one of them. Leaving a `with` block, `cancel()` and
    dropping a stream all end generation.

    A `with` block may also be left by the garbage collector (in an unreferenced generator), during a step of the
    engine. The snapshot is then the state that the stream continued.
    """

    def __init__(self, jobs: Sequence[Job], scheduler: Scheduler, lock: RLock) -> None:
        """A stream of submitted jobs."""
        self._jobs = tuple(jobs)
        self._open = list(jobs)
        self._open_lock = Lock()  # held only briefly, so that collecting never waits for the device
        self._scheduler, self._lock = scheduler, lock
        self._snapshot: Snapshot | None = None
        self._is_given_up = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk; raises the error that ended a text."""
        while (chunk := self._collect()) is None:
            self._run()
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """As `next`, while other tasks run. A cancelled task collects nothing."""
        try:
            while (chunk := self._collect()) is None:
                await asyncio.to_thread(self._run)
        except StopIteration:
            raise StopAsyncIteration from None
        return chunk

    def cancel(self) -> None:
        """Ends the texts at the chunks collected so far; others are dropped."""
        with self._lock, uninterrupted():
            self._is_given_up = self._is_given_up or (self._scheduler.is_busy and bool(self._open))
            for job in self._jobs:
                self._scheduler.cancel(job)
            with self._open_lock:
                self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.cancel)

    def __del__(self) -> None:
        for job in getattr(self, "_open", ()):
            job.is_abandoned = True

    @property
    def num_prompt_tokens(self) -> tuple[int, ...]:
        """Number of tokens of each prompt."""
        return tuple(len(job.request.ids) for job in self._jobs)

    @property
    def snapshot(self) -> Snapshot | None:
        """The state after exactly the collected chunks, once a stream with `return_state` has ended.

        After cancellation during prefill it is the state that was continued, or None.
        """
        job = self._jobs[0]
        if not job.request.return_state or self._open:
            raise RuntimeError("snapshot: is that of a single text, given return_state=True, whose stream has ended")
        with self._lock, uninterrupted():  # the step in which the text ended may still be running
            if self._snapshot is None:
                self._snapshot = self._after_collected(job)
            return self._snapshot

    def _after_collected(self, job: Job) -> Snapshot | None:
        if job.error is not None or self._is_given_up or self._scheduler.is_busy:
            return job.request.state
        num_collected = max(0, len(job.burst) - len(job.chunks))
        if job.snapshot is not None and num_collected == len(job.burst):
            return job.snapshot
        if job.last_burst is not None:
            collected = job.last_burst.ids[:num_collected]
            return self._scheduler.extend(job.last_burst.before, collected) if collected else job.last_burst.before
        return job.request.state

    def _run(self) -> None:
        """Runs the engine for one step unless there is a chunk to collect.

        Only one, so that a task yields its thread to others.
        """
        with self._lock, uninterrupted():
            if not self._has_news() and not self._scheduler.step() and not self._has_news():
                raise RuntimeError("the engine has nothing to do, and this text is not finished: this is our mistake")

    def _has_news(self) -> bool:
        jobs = self._open
        return not jobs or any(job.chunks or job.is_done for job in jobs)

    def _collect(self) -> Chunk | None:
        """A chunk if there is one; removes jobs that are done and empty. Raises StopIteration after the last."""
        with self._open_lock:
            for job in list(self._open):
                is_done = job.is_done  # read first: chunks are added before it is set
                if job.chunks:
                    chunk = job.chunks.popleft()
                    # Moves to the end; removed after its last chunk.
                    self._open.remove(job)
                    if chunk.finish_reason is None:
                        self._open.append(job)
                    return chunk
                if is_done:
                    self._open.remove(job)
                    if isinstance(job.error, StopIteration):  # which would look like the text's end
                        raise RuntimeError("the text could not be generated") from job.error
                    if job.error is not None:
                        raise job.error
            if not self._open:
                raise StopIteration
        return None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers Ctrl-C to the end of a step: it must not interrupt other texts."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])
