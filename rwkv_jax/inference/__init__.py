"""What runs a trained model: an engine for any number of texts, sampling, conversations whose state is the context."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

_MODULES = {
    "PILE_QA": "chat",
    "RAVEN": "chat",
    "WORLD": "chat",
    "ChatFormat": "chat",
    "Chunk": "requests",
    "Completion": "requests",
    "Dialogue": "dialogue",
    "Engine": "engine",
    "EngineOptions": "options",
    "NotFiniteError": "scheduler",
    "QueueFullError": "requests",
    "SamplingParams": "sampling",
    "Session": "session",
    "SessionBusyError": "session",
    "SessionCancelledError": "session",
    "Snapshot": "snapshot",
    "StateError": "snapshot",
    "Stream": "stream",
}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for, so that the formats of conversations can be read without loading JAX.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
