"""The queue for slots, in which clients take turns."""

from __future__ import annotations

import collections
from collections.abc import Callable

from rwkv_jax.inference.job import Job


class FairQueue:
    """Queued jobs by client, first in first out for each."""

    def __init__(self) -> None:
        self._jobs: dict[str, collections.deque[Job]] = {}  # the client whose turn it is first

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def append(self, job: Job) -> None:
        """Behind its client's other jobs."""
        self._jobs.setdefault(job.request.client_id, collections.deque()).append(job)

    def put_back(self, job: Job) -> None:
        """In front of all, where it was popped."""
        client = job.request.client_id
        own = self._jobs.pop(client, collections.deque())
        own.appendleft(job)
        self._jobs = {client: own} | self._jobs

    def remove(self, job: Job) -> None:
        """Takes out one that is queued."""
        self._jobs[job.request.client_id].remove(job)

    def remove_abandoned(self) -> None:
        """Takes out those that nobody will collect, and ends them."""
        for own in self._jobs.values():
            for job in [job for job in own if job.is_abandoned]:
                own.remove(job)
                job.is_done = True

    def pop(self, is_blocked: Callable[[Job], bool]) -> Job | None:
        """The first job of the next client that has one which is not blocked; that client is last then."""
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
