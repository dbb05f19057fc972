"""Inference: batched engine, sampling, and stateful conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.inference.chat import PILE_QA, RAVEN, WORLD, ChatFormat
    from rwkv_jax.inference.dialogue import Dialogue
    from rwkv_jax.inference.engine import Engine
    from rwkv_jax.inference.options import EngineOptions
    from rwkv_jax.inference.requests import Chunk, Completion, QueueFullError
    from rwkv_jax.inference.sampling import SamplingParams
    from rwkv_jax.inference.scheduler import NotFiniteError
    from rwkv_jax.inference.session import Session, SessionBusyError, SessionCancelledError
    from rwkv_jax.inference.snapshot import Snapshot, StateError
    from rwkv_jax.inference.stream import Stream

__all__ = [
    "PILE_QA",
    "RAVEN",
    "WORLD",
    "ChatFormat",
    "Chunk",
    "Completion",
    "Dialogue",
    "Engine",
    "EngineOptions",
    "NotFiniteError",
    "QueueFullError",
    "SamplingParams",
    "Session",
    "SessionBusyError",
    "SessionCancelledError",
    "Snapshot",
    "StateError",
    "Stream",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "chat": ("ChatFormat", "PILE_QA", "RAVEN", "WORLD"),
        "dialogue": ("Dialogue",),
        "engine": ("Engine",),
        "options": ("EngineOptions",),
        "requests": ("Chunk", "Completion", "QueueFullError"),
        "sampling": ("SamplingParams",),
        "scheduler": ("NotFiniteError",),
        "session": ("Session", "SessionBusyError", "SessionCancelledError"),
        "snapshot": ("Snapshot", "StateError"),
        "stream": ("Stream",),
    },
)
