"""Measurements behind `rwkv bench`."""

from rwkv_jax.bench.measure import MemoryUse, Timing, latency, memory, throughput

__all__ = ["MemoryUse", "Timing", "latency", "memory", "throughput"]
