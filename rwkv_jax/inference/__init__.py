"""What runs a trained model: an engine for any number of texts, sampling, conversations whose state is the context."""

from rwkv_jax.inference.engine import Engine, EngineOptions
from rwkv_jax.inference.requests import Chunk, Completion, QueueFullError
from rwkv_jax.inference.sampling import Sampling
from rwkv_jax.inference.session import Session
from rwkv_jax.inference.snapshot import Snapshot, StateError
from rwkv_jax.inference.stream import Stream

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineOptions",
    "QueueFullError",
    "Sampling",
    "Session",
    "Snapshot",
    "StateError",
    "Stream",
]
