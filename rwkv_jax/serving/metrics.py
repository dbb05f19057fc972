"""What /metrics reports, for Prometheus: one registry for each app."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rwkv_jax.inference.engine.driver import EngineStats
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.serving.token_counts import count_tokens

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `Metrics.text`."""

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


class Metrics:
    """Counters and histograms of one app."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("rwkv_requests", "Requests answered.", ["route", "method", "status"], registry=registry)
        self.request_seconds = Histogram(
            "rwkv_request_seconds",
            "Seconds from a request's header to the end of its response.",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("rwkv_requests_in_flight", "Requests being answered.", registry=registry)
        self.first_token_seconds = Histogram(
            "rwkv_time_to_first_token_seconds",
            "Seconds from submission to the engine, queue included, to a text's first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "rwkv_time_per_token_seconds",
            "Mean seconds between the tokens of a text after its first one.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Reports what an engine counts, too, read at each scrape."""
        self._registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self._registry)

    async def timed(self, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk]:
        """The same chunks of one or more texts, timed and counted."""
        begin = time.perf_counter()
        first: dict[int, float] = {}  # by text
        counts: dict[int, int] = {}
        async for chunk in chunks:
            now = time.perf_counter()
            if chunk.ids and chunk.index not in first:
                first[chunk.index] = now
                self.first_token_seconds.observe(now - begin)
            count_tokens("completion_tokens", len(chunk.ids))
            count = counts[chunk.index] = counts.get(chunk.index, 0) + len(chunk.ids)
            if chunk.finish_reason is not None and count > 1:
                self.token_seconds.observe((now - first[chunk.index]) / (count - 1))
            yield chunk


class _EngineCollector(Collector):
    """The engine's own counts."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        stats = self._stats()
        for name, value, meaning in (
            ("rwkv_slots", stats.num_slots, "Texts that can be on the device at once."),
            ("rwkv_running_texts", stats.num_running, "Texts on the device."),
            ("rwkv_queued_texts", stats.num_queued, "Texts that wait for a slot."),
            ("rwkv_paused_texts", stats.num_swapped_out, "Texts off the device that wait for their clients to read."),
            ("rwkv_prefix_cache_bytes", stats.prefix_bytes, "Size of the states in the prefix cache."),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        for name, value, meaning in (
            ("rwkv_prompt_tokens", stats.prompt_tokens, "Tokens of prompts that were read."),
            (
                "rwkv_cached_prompt_tokens",
                stats.cached_tokens,
                "Tokens of prompts that the prefix cache spared from being read.",
            ),
            ("rwkv_generated_tokens", stats.generated_tokens, "Tokens generated."),
            ("rwkv_prefix_cache_hits", stats.prefix_hits, "Prompts that began with one in the prefix cache."),
            ("rwkv_prefix_cache_misses", stats.prefix_misses, "Prompts that did not."),
        ):
            yield CounterMetricFamily(name, meaning, value=value)
