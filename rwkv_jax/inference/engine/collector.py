"""Runs texts that are collected as a whole, without taking more of the queue than they need."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from rwkv_jax.inference.engine.admission import Admission
from rwkv_jax.inference.engine.driver import Driver
from rwkv_jax.inference.engine.news import News
from rwkv_jax.inference.engine.requests import Chunk, Request
from rwkv_jax.inference.engine.stream import Stream


class Collector:
    """Submits texts to an engine's thread and collects their chunks."""

    def __init__(self, driver: Driver, admission: Admission, num_slots: int) -> None:
        self._driver, self._admission, self._num_slots = driver, admission, num_slots

    def try_streams(self, requests: Sequence[Request]) -> list[Stream]:
        """Streams to be collected as a whole, of as many of the texts as the queue has room for."""
        requests = requests[: self._driver.room]
        news = [News() for _ in requests]
        jobs = [self._admission.jobs([request], each) for request, each in zip(requests, news, strict=True)]
        if not self._driver.try_submit([job for own in jobs for job in own]):  # others were faster
            return []
        return [Stream(own, each, self._driver) for own, each in zip(jobs, news, strict=True)]

    def run(self, requests: Sequence[Request]) -> list[tuple[Stream, list[Chunk]]]:
        """Runs texts to their ends. Queues only as many as may start soon, to leave room for others."""
        ended: list[tuple[Stream, list[Chunk]]] = []
        running: collections.deque[tuple[Stream, list[Chunk]]] = collections.deque()
        num_sent = 0
        try:
            while len(ended) < len(requests):
                num_waiting = sum(not stream.has_begun for stream, _ in running)
                soon = requests[num_sent : num_sent + self._num_slots - num_waiting]
                streams = self.try_streams(soon) if soon else []
                running.extend((stream, []) for stream in streams)
                num_sent += len(streams)
                if not running:
                    self._driver.wait_for_room()
                    continue
                stream, chunks = running[0]
                if (chunk := next(stream, None)) is not None:
                    chunks.append(chunk)
                else:
                    ended.append(running.popleft())
        finally:
            for stream, _ in running:
                stream.cancel()
        return ended
