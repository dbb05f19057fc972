"""A conversation between a user and a model in a chat format: the state is the history, and turns can be taken back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import Any, Protocol, Self

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.chat import ChatFormat
from rwkv_jax.inference.session import EngineLike, Session
from rwkv_jax.inference.snapshot import Snapshot

MOST_TURNS_KEPT = 16
"""Turns that can be taken back. Each keeps two states, so that a long conversation would hold many."""


class ChatEngine(EngineLike, Protocol):
    """What a dialogue asks of an engine."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...


@dataclasses.dataclass(frozen=True)
class _Standing:
    """Where a conversation stands: behind a reply, or before all."""

    snapshot: Snapshot | None = None
    """The state behind all that was read."""
    read: str = ""
    """What the model has read since the last message, a stop string included."""
    said: str = ""
    """What of it is the reply."""
    asked: Snapshot | None = None
    """The state behind the last message, before the reply."""
    message: str | None = None
    """The last message."""


class Dialogue:
    """One conversation. Each turn reads nothing but its new text, whatever the length of the conversation.

    After an error a dialogue stands where it stood before.
    """

    def __init__(self, engine: ChatEngine, chat_format: ChatFormat, system: str | None = None) -> None:
        """At the start of a conversation.

        Args:
          system: what the model is told before the first message.

        Raises:
          ConfigError: a system message that is empty, or that the format has no place for.
        """
        chat_format.first_turn("message", system)  # refuses it now rather than after the first message
        self._engine, self._format, self._system = engine, chat_format, system
        self._standing = _Standing()
        self._past: tuple[_Standing, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens read since the conversation began."""
        return 0 if self._standing.snapshot is None else self._standing.snapshot.num_tokens

    @property
    def last_message(self) -> str | None:
        """What the last reply answers; None if there is none."""
        return self._standing.message

    @property
    def thoughts(self) -> str:
        """What the model thought before its last answer, in a format that has it think."""
        return self._format.thoughts(self._standing.said)

    def say(self, message: str, **arguments: Any) -> Generator[str]:
        """The model's answer to a message, a piece a token; empty where a token shows nothing, as in thoughts.

        Closing the iterator ends the reply behind what was given out, and the conversation goes on from there.

        Args:
          arguments: as `Engine.stream` has them: max_tokens, sampling, seed.

        Raises:
          ConfigError: an empty message, or a value that the engine refuses; with the first piece.
        """
        before, tokenizer = self._standing, self._engine.tokenizer
        session = Session(self._engine, before.snapshot)
        session.append(self._prompt(message))
        asked = session.snapshot
        ids: list[int] = []
        said, stop, num_shown = "", None, 0
        ends = {"stop": self._format.stop_strings, "stop_ids": (tokenizer.end_of_text,)}
        with contextlib.suppress(GeneratorExit), session.stream(**ends, **arguments) as stream:
            for chunk in stream:
                ids += chunk.ids
                said, stop = said + chunk.text, chunk.stop
                answer = self._format.answer(said)
                yield answer[num_shown:]
                num_shown = max(num_shown, len(answer))
        if stop == tokenizer.end_of_text:
            # Behind that token another text begins, of which this conversation would be no part.
            session = Session(self._engine, asked)
            if ids:
                session.append(ids)
        self._past = (*self._past, before)[-MOST_TURNS_KEPT:]
        self._standing = _Standing(session.snapshot, tokenizer.decode(ids), said, asked, message)

    def undo(self) -> str:
        """Takes the last turn back, and returns its message. Raises ConfigError if there is none, or none is kept."""
        if not self._past:
            raise ConfigError(f"undo: there is no turn to take back; the last {MOST_TURNS_KEPT} are kept")
        message = self._standing.message
        assert message is not None
        *past, self._standing = self._past
        self._past = tuple(past)
        return message

    def fork(self) -> Self:
        """Another conversation that stands here and goes its own way; copies no array."""
        other = type(self)(self._engine, self._format, self._system)
        other._standing, other._past = self._standing, self._past
        return other

    def reset(self) -> None:
        """Begins anew, and forgets all turns."""
        self._standing, self._past = _Standing(), ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state, with the last reply closed, so that any turn may follow.

        Raises:
          ConfigError: nothing was said yet, or as `Session.save`.
        """
        standing = self._standing
        session = Session(self._engine, standing.snapshot if standing.asked is None else standing.asked)
        if standing.asked is not None:
            # What stopped the reply may have begun the next turn: read it again without.
            session.append(standing.said + self._format.closing(standing.said))
        session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a file of `save`, or of a session whose last turn is closed; forgets all turns.

        Raises:
          StateError: the state of another model or tokenizer.
          ConfigError: no such file, or a damaged one.
        """
        session = Session.load(self._engine, path)
        self._standing, self._past = _Standing(session.snapshot, self._format.separator), ()

    def _prompt(self, message: str) -> str:
        if self._standing.snapshot is None:
            return self._format.first_turn(message, self._system)
        return self._format.next_turn(message, self._standing.read)
