"""Streams of chunks for `for` and `async for`, cancellable at any token."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from threading import RLock
from types import TracebackType
from typing import Self

from rwkv_jax.inference.engine.driver import Driver
from rwkv_jax.inference.engine.job import Job
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.inference.engine.scoring import Score, join_scores
from rwkv_jax.inference.state.snapshot import Snapshot


class Stream:
    """Chunks of one or several texts, in the order of generation.

    The engine's thread generates them ahead of their consumer. Streams of one engine may be consumed by any threads and
    tasks, each stream by one of them. Leaving a `with` block, `cancel()` and dropping a stream all end generation.
    """

    def __init__(self, jobs: Sequence[Job], news: News, driver: Driver) -> None:
        """A stream of submitted jobs that announce their chunks in `news`."""
        self._jobs = tuple(jobs)
        self._open = list(jobs)
        self._lock = RLock()  # held only briefly; reentrant, since a finalizer may come along
        self._news, self._driver = news, driver
        self._has_collected = False
        self._snapshot: Snapshot | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk; raises the error that ended a text."""
        while (chunk := self._collect()) is None:
            self._driver.refuse_own_thread()
            self._news.wait(self._has_news)
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """As `next`, while other tasks run. A cancelled task collects nothing."""
        try:
            while (chunk := self._collect()) is None:
                await self._news.wait_async(self._has_news)
        except StopIteration:
            raise StopAsyncIteration from None
        return chunk

    def cancel(self) -> None:
        """Ends the texts at the chunks collected so far, within one step; others are dropped.

        A finalizer in the engine's own thread, where a generator that has this stream in a `with` block may be
        collected, cannot wait for that: the texts end all the same, and the snapshot is the state that they continued.
        """
        with self._lock:
            left, self._open = self._open, []
        self._news.announce()
        if all(job.is_done for job in self._jobs):
            return
        if self._driver.is_own_thread:
            self._abandon(left)
        else:
            self._driver.call_unless_closed(self._cancel)

    def _cancel(self) -> None:
        for job in self._jobs:
            self._driver.scheduler.cancel(job)

    def _abandon(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.is_abandoned = True
        if jobs:
            self._driver.wake()

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
        self._abandon(getattr(self, "_open", ()))

    @property
    def num_prompt_tokens(self) -> tuple[int, ...]:
        """Number of tokens of each prompt."""
        return tuple(len(job.request.ids) for job in self._jobs)

    @property
    def has_begun(self) -> bool:
        """Whether all its texts have left the queue."""
        return all(job.has_begun for job in self._jobs)

    @property
    def num_cached_tokens(self) -> tuple[int, ...]:
        """Of these, tokens whose state was in the prefix cache; known with the first chunk."""
        return tuple(job.num_cached for job in self._jobs)

    @property
    def score(self) -> Score:
        """The scores of its one text, which was only to be scored and has ended."""
        (job,) = self._jobs
        return join_scores(job.request.scored_ids, job.scores)

    @property
    def snapshot(self) -> Snapshot | None:
        """The state after exactly the collected chunks, once a stream with `return_state` has ended.

        If none was collected it is the state that was continued, or None.
        """
        job = self._jobs[0]
        if not job.request.return_state or self._open:
            raise RuntimeError("snapshot: is that of a single text, given return_state=True, whose stream has ended")
        if job.error is not None or not self._has_collected or self._driver.is_own_thread:
            return job.request.state
        if self._snapshot is None:
            self._snapshot = self._after_collected(job)
        return self._snapshot

    def _after_collected(self, job: Job) -> Snapshot | None:
        if not job.is_done:  # the step in which it ended is still under way
            self._driver.wait_for_step()
        num_collected = max(0, len(job.burst) - len(job.chunks))
        if job.snapshot is not None and num_collected == len(job.burst):
            return job.snapshot
        if job.last_burst is not None:
            collected, before = job.last_burst.ids[:num_collected], job.last_burst.before
            extend = functools.partial(self._driver.scheduler.extend, before, collected, job.request.adapter)
            return self._driver.call(extend) if collected else before
        return job.request.state

    def _has_news(self) -> bool:
        jobs = self._open
        return not jobs or any(job.chunks or job.is_done for job in jobs)

    def _collect(self) -> Chunk | None:
        """A chunk if there is one; removes jobs that are done and empty. Raises StopIteration after the last."""
        with self._lock:
            for job in list(self._open):
                is_done = job.is_done  # read first: chunks are added before it is set
                if job.chunks:
                    chunk = job.chunks.popleft()
                    self._has_collected = True
                    # Moves to the end; removed after its last chunk.
                    self._open.remove(job)
                    if chunk.finish_reason is None:
                        self._open.append(job)
                    # Whatever it was before: the engine may have added chunks up to the limit just now.
                    if len(job.chunks) + 1 == job.pending_limit:
                        self._driver.wake()
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
