"""Conversations: the state is the context, so a session has constant size and forking it copies nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self, Unpack

from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.inference.engine.prompts import SessionArguments, is_one
from rwkv_jax.inference.engine.requests import Chunk, Completion, Prompt, join
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import load_snapshot, save_snapshot

if TYPE_CHECKING:
    from rwkv_jax.inference.engine.engine import Engine
    from rwkv_jax.inference.engine.stream import Stream


class SessionBusyError(ConfigError):
    """The session is in use; its state is unknown until that call ends."""


class SessionCancelledError(RuntimeError):
    """A generation was cancelled by another caller while this one waited for it."""


class Session:
    """A conversation's state, which advances with appended and generated tokens.

    Each text is encoded separately, so two appended texts may have other tokens than their concatenation. All generated
    tokens, including a stop token, are part of the state, and the next call continues from there. Penalties count the
    tokens of one call, as in the official package. After an error the session is unchanged. Concurrent calls do not
    wait for each other: the later one raises SessionBusyError.
    """

    def __init__(
        self,
        engine: Engine,
        snapshot: Snapshot | None = None,
        on_change: Callable[[Session], None] = lambda session: None,
        adapter: str | None = None,
    ) -> None:
        """Starts at a snapshot of the engine's model; None is the start of a text.

        Args:
          on_change: called when the state or the marks have changed.
          adapter: name of the engine's adapter with which all of it is read and generated; None for none.
        """
        self.adapter = adapter
        self._on_change = on_change
        self._engine = engine
        self._snapshot = snapshot
        self._marks: dict[str, Snapshot | None] = {}
        self._lock = threading.RLock()  # held only briefly; reentrant, since a finalizer may come along
        self._in_use: str | None = None
        # Weak, so that a stream dropped by its consumer is collected and ends.
        self._stream: weakref.ref[Stream] | None = None

    @property
    def snapshot(self) -> Snapshot | None:
        """The state, which is immutable; None before any token. Raises SessionBusyError."""
        with self._alone("snapshot"):
            return self._snapshot

    @property
    def num_tokens(self) -> int:
        """Tokens since the start, without those of a running stream."""
        snapshot = self._snapshot
        return 0 if snapshot is None else snapshot.num_tokens

    @property
    def is_in_use(self) -> bool:
        """Whether a call or running stream uses it."""
        return self._in_use is not None and not self._was_dropped()

    @property
    def nbytes(self) -> int:
        """Bytes of the state and marked states, without those of a running stream."""
        states = {id(state): state for state in (self._snapshot, *self._marks.copy().values()) if state is not None}
        return sum(state.nbytes for state in states.values())

    def append(self, prompt: Prompt) -> None:
        """Prefills a text or token ids.

        Raises ConfigError if it is empty or has ids beyond the vocabulary, or SessionBusyError.
        """
        with self._alone("append"):
            self._snapshot = self._engine.prefill(self._snapshot, prompt, adapter=self.adapter)
        self._on_change(self)

    def generate(self, prompt: Prompt = "", **arguments: Unpack[SessionArguments]) -> Completion:
        """Continues, after a prompt if given; arguments and errors as in `stream`.

        If interrupted, the session is unchanged.
        """
        with self.stream(prompt, **arguments) as stream:
            try:
                chunks = list(stream)
            except BaseException:
                self._give_up(stream._stream)
                raise
        if not chunks or chunks[-1].finish_reason is None:
            raise SessionCancelledError(
                f"generate: was cancelled after {len(chunks)} tokens; the session has {self.num_tokens} tokens"
            )
        return join(chunks, 0, stream.num_prompt_tokens)

    def stream(self, prompt: Prompt = "", **arguments: Unpack[SessionArguments]) -> SessionStream:
        """Continues chunk by chunk, after a prompt if given. The session is busy until the stream ends.

        A stream dropped before its end leaves the session unchanged.

        Args:
          prompt: prefilled first; may be empty if the session has a state.
          arguments: as in `rwkv_jax.inference.engine.engine.Engine.stream`, for one text.

        Raises:
          ConfigError: there is nothing to continue, or an invalid value.
          SessionBusyError: the session is in use.
        """
        if not is_one(prompt) and len(prompt):
            raise ConfigError("prompt: a session continues with one text at a time; there are several")
        for name in ("state", "return_state", "adapter"):
            if name in arguments:
                raise ConfigError(f"{name}: a session continues its own state, which it keeps; leave {name} out")
        self._claim("stream")
        try:
            stream = self._engine.stream(
                prompt, state=self._snapshot, return_state=True, adapter=self.adapter, **arguments
            )
        except BaseException:
            self._release()
            raise
        self._stream = weakref.ref(stream)
        return SessionStream(self, stream)

    def cancel(self) -> None:
        """Ends the running stream, if any, at the chunks collected so far; from any thread."""
        if (stream := self._running()) is not None:
            self._cancel(stream)

    def fork(self) -> Session:
        """An independent session with the same state and marks; shares all arrays."""
        with self._alone("fork"):
            other = Session(self._engine, self._snapshot, adapter=self.adapter)
            other._marks = dict(self._marks)
            return other

    def mark(self, name: str) -> None:
        """Names the current state for `rewind`; a mark of that name moves here."""
        _check_mark(name)
        with self._alone("mark"):
            self._marks[name] = self._snapshot
        self._on_change(self)

    def rewind(self, name: str) -> None:
        """Returns to a marked state; all marks stay. Raises ConfigError for an unknown name."""
        _check_mark(name)
        with self._alone("rewind"):
            if name not in self._marks:
                names = ", ".join(map(repr, self._marks)) or "none"
                raise ConfigError(f"mark {name!r}: there is none of that name; the marks of this session are: {names}")
            self._snapshot = self._marks[name]
        self._on_change(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the state, without marks, to a file that only the same model and tokenizer load.

        Raises ConfigError for an empty session, and as `rwkv_jax.inference.state.state_file.save_snapshot`.
        """
        with self._alone("save"):
            if self._snapshot is None:
                raise ConfigError(f"{path}: the session has read nothing that could be saved; append a text first")
            save_snapshot(path, self._snapshot, self._engine.identity_of(self.adapter))

    @classmethod
    def load(cls, engine: Engine, path: str | os.PathLike[str], adapter: str | None = None) -> Self:
        """A session in a saved state. Raises as `rwkv_jax.inference.state.state_file.load_snapshot`."""
        snapshot = load_snapshot(path, engine.identity_of(adapter))
        return cls(engine, dataclasses.replace(snapshot, owner=engine.adapters.owner_of(adapter)), adapter=adapter)

    # Used by its streams.

    def _cancel(self, stream: Stream) -> None:
        stream.cancel()
        self._settle(stream)

    def _settle(self, stream: Stream) -> None:
        """Takes over the state of an ended stream."""
        if self._running() is not stream:
            return
        try:
            snapshot = stream.snapshot  # first: if this is interrupted, the session can still be cancelled
        except Exception:
            self._give_up(stream)
            raise
        if self._end(stream, snapshot):
            self._on_change(self)

    def _give_up(self, stream: Stream) -> None:
        """Restores the state from before a failed stream."""
        self._end(stream, self._snapshot)

    def _end(self, stream: Stream, snapshot: Snapshot | None) -> bool:
        """Frees the session at a state; True only once, since consumer and canceller may both see a stream end."""
        with self._lock:
            if self._running() is not stream:
                return False
            self._snapshot, self._stream, self._in_use = snapshot, None, None
            return True

    def _running(self) -> Stream | None:
        return None if self._stream is None else self._stream()

    def _was_dropped(self) -> bool:
        """Whether it was in use by a dropped stream."""
        return self._stream is not None and self._stream() is None

    def _claim(self, use: str) -> None:
        with self._lock:
            if self._in_use is not None and not self._was_dropped():
                raise SessionBusyError(
                    f"{use}: the session is in use by a call of {self._in_use}; wait for its end, and of a stream read "
                    "all chunks or cancel() it (a `with` block does), or fork() the session before"
                )
            self._in_use, self._stream = use, None

    def _release(self) -> None:
        with self._lock:
            self._in_use = None

    @contextlib.contextmanager
    def _alone(self, use: str) -> Iterator[None]:
        self._claim(use)
        try:
            yield
        finally:
            self._release()


def _check_mark(name: object) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"mark {shown(name)}: must be a string")


class SessionStream:
    """Chunks of a session's continuation, for `for` and `async for`; when it ends, the session takes over its state.

    It ends with the last chunk, with `cancel` of the stream or session, or with its `with` block. If it ends before its
    first chunk, the prompt may or may not have been prefilled; see `Session.num_tokens`. If the engine fails, the
    session is unchanged.
    """

    def __init__(self, session: Session, stream: Stream) -> None:
        self._session, self._stream = session, stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            return next(self._stream)
        except StopIteration:
            self._session._settle(self._stream)
            raise
        except Exception:
            # Not after an interrupt, when the stream can still be cancelled.
            self._session._give_up(self._stream)
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """As `next`, while other tasks run. A cancelled task collects nothing."""
        try:
            return await anext(self._stream)
        except StopAsyncIteration:
            await asyncio.to_thread(self._session._settle, self._stream)
            raise
        except Exception:
            self._session._give_up(self._stream)
            raise

    def cancel(self) -> None:
        """Ends the stream at the chunks collected so far, from any thread; no effect on an ended one."""
        self._session._cancel(self._stream)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._stream.num_prompt_tokens[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.cancel)
