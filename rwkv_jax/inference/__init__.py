"""Inference: batched engine, sampling, and stateful conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD, ChatFormat
    from rwkv_jax.chat.jinja_template import JinjaTemplate
    from rwkv_jax.chat.messages import Message, ToolCall
    from rwkv_jax.chat.replies import Delta, Reply, ReplyParser
    from rwkv_jax.chat.template import ChatTemplate
    from rwkv_jax.inference.chat.dialogue import Dialogue
    from rwkv_jax.inference.embedder import Embedder
    from rwkv_jax.inference.engine.driver import EngineClosedError, EngineStats
    from rwkv_jax.inference.engine.engine import Engine
    from rwkv_jax.inference.engine.options import EngineOptions
    from rwkv_jax.inference.engine.requests import Chunk, Completion, NotFiniteError, QueueFullError
    from rwkv_jax.inference.engine.scoring import Score
    from rwkv_jax.inference.engine.stream import Stream
    from rwkv_jax.inference.sampling.grammar import Grammar, GrammarError
    from rwkv_jax.inference.sampling.params import SamplingParams
    from rwkv_jax.inference.state.session import Session, SessionBusyError, SessionCancelledError
    from rwkv_jax.inference.state.snapshot import Snapshot, StateError

__all__ = [
    "G1",
    "PILE_QA",
    "RAVEN",
    "WORLD",
    "ChatFormat",
    "ChatTemplate",
    "Chunk",
    "Completion",
    "Delta",
    "Dialogue",
    "Embedder",
    "Engine",
    "EngineClosedError",
    "EngineOptions",
    "EngineStats",
    "Grammar",
    "GrammarError",
    "JinjaTemplate",
    "Message",
    "NotFiniteError",
    "QueueFullError",
    "Reply",
    "ReplyParser",
    "SamplingParams",
    "Score",
    "Session",
    "SessionBusyError",
    "SessionCancelledError",
    "Snapshot",
    "StateError",
    "Stream",
    "ToolCall",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".chat.formats": ("ChatFormat", "G1", "PILE_QA", "RAVEN", "WORLD"),
        ".chat.jinja_template": ("JinjaTemplate",),
        ".chat.messages": ("Message", "ToolCall"),
        ".chat.replies": ("Delta", "Reply", "ReplyParser"),
        ".chat.template": ("ChatTemplate",),
        "chat.dialogue": ("Dialogue",),
        "engine.driver": ("EngineClosedError", "EngineStats"),
        "embedder": ("Embedder",),
        "engine.engine": ("Engine",),
        "engine.options": ("EngineOptions",),
        "engine.requests": ("Chunk", "Completion", "NotFiniteError", "QueueFullError"),
        "sampling.grammar": ("Grammar", "GrammarError"),
        "sampling.params": ("SamplingParams",),
        "engine.scoring": ("Score",),
        "state.session": ("Session", "SessionBusyError", "SessionCancelledError"),
        "state.snapshot": ("Snapshot", "StateError"),
        "engine.stream": ("Stream",),
    },
)
