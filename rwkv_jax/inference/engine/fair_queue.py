"""Fair queue for slots: clients take turns."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from rwkv_jax.inference.engine.job import Job


class FairQueue:
    """Queued jobs by client, first in first out per client."""

    def __init__(self) -> None:
        self._jobs: dict[str, collections.deque[Job]] = {}  # the client whose turn it is first

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def __iter__(self) -> Iterator[Job]:
        return iter([job for own in self._jobs.values() for job in own])

    def append(self, job: Job) -> None:
        """Appends a job to its client's queue."""
        self._jobs.setdefault(job.request.client_id, collections.deque()).append(job)

    def put_back(self, job: Job) -> None:
        """Puts a job back to the front, from where it was popped."""
        client = job.request.client_id
        own = self._jobs.pop(client, collections.deque())
        own.appendleft(job)
        self._jobs = {client: own} | self._jobs

    def remove(self, job: Job) -> None:
        """Removes a queued job."""
        self._jobs[job.request.client_id].remove(job)

    def remove_abandoned(self) -> None:
        """Removes and ends jobs that nobody will collect."""
        for own in self._jobs.values():
            for job in [job for job in own if job.is_abandoned]:
                own.remove(job)
                job.end()

    def pop(self, is_blocked: Callable[[Job], bool]) -> Job | None:
        """Pops the first unblocked job of the next client, which then becomes the last."""
        for client, own in list(self._jobs.items()):
            job = next((job for job in own if not is_blocked(job)), None)
            if job is None and own:
                continue
            del self._jobs[client]
            if job is not None:
                own.remove(job)
                if own:
                    self._jobs[client] = own
                return job
        return None
