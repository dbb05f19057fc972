"""Measurements behind `rwkv bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.bench.measure import MemoryUse, Timing, latency, memory, throughput

__all__ = ["MemoryUse", "Timing", "latency", "memory", "throughput"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"measure": ("MemoryUse", "Timing", "latency", "memory", "throughput")},
)
