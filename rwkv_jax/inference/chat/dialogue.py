"""A conversation in a chat format: the state holds the history, and turns can be undone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Self

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.chat.formats import ChatFormat
from rwkv_jax.inference.chat.replies import Delta, Reply
from rwkv_jax.inference.state.session import Session
from rwkv_jax.inference.state.snapshot import Snapshot

if TYPE_CHECKING:
    from rwkv_jax.inference.engine.engine import Engine

MAX_UNDO_TURNS = 16
"""Maximum turns that `undo` can take back; each keeps two states."""


@dataclasses.dataclass(frozen=True)
class _Position:
    """A point between two turns."""

    snapshot: Snapshot | None = None
    """The state at this point."""
    tail: str = ""
    """Text since the last message, including a stop string."""
    reply: str = ""
    """The reply, which `tail` begins with."""
    thoughts: str = ""
    """The thinking in the reply."""
    before_reply: Snapshot | None = None
    """The state after the last message."""
    message: str | None = None
    """The last message."""


class Dialogue:
    """One conversation. A turn prefills only its new text, however long the conversation is.

    After an error a dialogue is unchanged.
    """

    def __init__(self, engine: Engine, chat_format: ChatFormat, system: str | None = None) -> None:
        """Starts a conversation.

        Args:
          system: system message.

        Raises:
          ConfigError: an empty system message, or a format without one.
        """
        chat_format.first_turn("message", system)  # reject it now rather than after the first message
        self._engine, self._format, self._system = engine, chat_format, system
        self._position = _Position()
        self._past: tuple[_Position, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens since the start of the conversation."""
        return 0 if self._position.snapshot is None else self._position.snapshot.num_tokens

    @property
    def last_message(self) -> str | None:
        """The message of the last turn; None before the first."""
        return self._position.message

    @property
    def thoughts(self) -> str:
        """The model's thinking before its last answer, in a format with thinking."""
        return self._position.thoughts

    def reply(self, message: str, **arguments: Any) -> Generator[str]:
        """Yields the model's answer to a message, one piece per token; empty if nothing is shown, as while thinking.

        Closing the iterator ends the reply at what was shown, and the conversation continues from there.

        Args:
          arguments: as in `Engine.stream`: max_tokens, sampling, seed.

        Raises:
          ConfigError: an empty message or an invalid value; raised with the first piece.
        """
        before, tokenizer = self._position, self._engine.tokenizer
        session = Session(self._engine, before.snapshot)
        if before.snapshot is None:
            prompt = self._format.first_turn(message, self._system)
        else:
            prompt = self._format.next_turn(message, before.tail)
        session.append(prompt)
        before_reply = session.snapshot
        parser = self._format.reply_parser(prompt)
        deltas: list[Delta] = []
        ids: list[int] = []
        reply, stop = "", None
        ends = {"stop": self._format.stop_strings, "stop_ids": (tokenizer.end_of_text,)}
        with contextlib.suppress(GeneratorExit), session.stream(**ends, **arguments) as stream:
            for chunk in stream:
                ids += chunk.ids
                reply, stop = reply + chunk.text, chunk.stop
                new = parser.push(chunk.text) + (parser.flush() if chunk.finish_reason is not None else [])
                deltas += new
                yield Reply.of(new).content
        if stop == tokenizer.end_of_text:
            # After that token another text begins, without this conversation.
            session = Session(self._engine, before_reply)
            if ids:
                session.append(ids)
        self._past = (*self._past, before)[-MAX_UNDO_TURNS:]
        thoughts = Reply.of(deltas).reasoning
        self._position = _Position(session.snapshot, tokenizer.decode(ids), reply, thoughts, before_reply, message)

    def undo(self) -> str:
        """Undoes the last turn and returns its message. Raises ConfigError if no turn is kept."""
        if not self._past:
            raise ConfigError(f"undo: there is no turn to take back; the last {MAX_UNDO_TURNS} are kept")
        message = self._position.message
        assert message is not None
        *past, self._position = self._past
        self._past = tuple(past)
        return message

    def fork(self) -> Self:
        """An independent conversation at the same point; shares all arrays."""
        other = type(self)(self._engine, self._format, self._system)
        other._position, other._past = self._position, self._past
        return other

    def reset(self) -> None:
        """Starts over and forgets all turns."""
        self._position, self._past = _Position(), ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the state with the last reply closed, so that any turn may follow.

        Raises:
          ConfigError: there is no turn to save, or as `Session.save`.
        """
        position = self._position
        if position.snapshot is None:
            raise ConfigError(f"{path}: there is nothing to save: no reply has been kept")
        session = Session(self._engine, position.snapshot if position.before_reply is None else position.before_reply)
        if position.before_reply is not None:
            # The stop string may have begun the next turn: prefill the reply again without it.
            session.append(position.reply + self._format.closing(position.reply))
        session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a file saved by `save` or by a session whose last turn is closed; forgets all turns.

        Raises:
          StateError: the state of another model or tokenizer.
          ConfigError: no such file, or a damaged one.
        """
        session = Session.load(self._engine, path)
        self._position, self._past = _Position(session.snapshot, self._format.separator), ()
