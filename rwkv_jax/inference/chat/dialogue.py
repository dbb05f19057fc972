"""A conversation by turns: the state holds the history, and turns can be undone.

A `ChatFormat` writes each turn behind the text so far. Any other template writes all messages anew, and of what it
writes the state reads what is new: the last reply again, without what of it the template leaves out, and the message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Self

from rwkv_jax.chat.formats import ChatFormat
from rwkv_jax.chat.messages import Message
from rwkv_jax.chat.replies import Delta, Reply
from rwkv_jax.chat.template import ChatTemplate, Thinking, check_start, start_of
from rwkv_jax.config import ConfigError
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
    start: Snapshot | None = None
    """The state at the start of the conversation, where it was loaded."""
    messages: tuple[Message, ...] = ()
    """What was said since then."""
    prompt: str = ""
    """Text before the last reply, in a template that writes all messages anew."""
    before_reply: Snapshot | None = None
    """The state after the prompt."""
    reply: str = ""
    """The last reply."""
    tail: str = ""
    """Text since the prompt: the reply and a stop string."""
    thoughts: str = ""
    """The thinking in the reply."""
    message: str | None = None
    """The last message of the user."""


class Dialogue:
    """One conversation. A turn prefills only its new text, however long the conversation is.

    After an error a dialogue is unchanged.
    """

    def __init__(
        self, engine: Engine, template: ChatTemplate, system: str | None = None, thinking: Thinking | None = None
    ) -> None:
        """Starts a conversation.

        Args:
          system: system message.
          thinking: None for the template's own.

        Raises:
          ConfigError: an empty system message, or a template without one or without this way of thinking.
        """
        check_start(template, system, thinking)  # reject it now rather than after the first message
        if isinstance(template, ChatFormat) and thinking is not None:
            template = dataclasses.replace(template, thinking=thinking)
        self._engine, self._template, self._system = engine, template, system
        self._thinking: Thinking | None = thinking
        self._position = _Position(messages=start_of(system))
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
        """The model's thinking before its last answer."""
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
        messages = (*before.messages, Message("user", message))
        session, prompt = self._read(messages, before)
        before_reply = session.snapshot
        parser = self._template.reply_parser(prompt)
        deltas: list[Delta] = []
        ids: list[int] = []
        reply, stop = "", None
        ends = {"stop": self._template.stop_strings, "stop_ids": tokenizer.ends}
        with contextlib.suppress(GeneratorExit), session.stream(**ends, **arguments) as stream:
            for chunk in stream:
                ids += chunk.ids
                reply, stop = reply + chunk.text, chunk.stop
                new = parser.push(chunk.text) + (parser.flush() if chunk.finish_reason is not None else [])
                deltas += new
                yield Reply.of(new).content
        if stop in tokenizer.ends:
            # After the end of text another one begins, without this conversation; the template closes a turn itself.
            session = Session(self._engine, before_reply)
            if ids:
                session.append(ids)
        parts = Reply.of(deltas)
        if parts.content or parts.reasoning:
            messages += (Message("assistant", parts.content, parts.reasoning),)
        self._past = (*self._past, before)[-MAX_UNDO_TURNS:]
        self._position = _Position(
            snapshot=session.snapshot,
            start=before.start,
            messages=messages,
            prompt=prompt,
            before_reply=before_reply,
            reply=reply,
            tail=tokenizer.decode(ids),
            thoughts=parts.reasoning,
            message=message,
        )

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
        other = type(self)(self._engine, self._template, self._system, self._thinking)
        other._position, other._past = self._position, self._past
        return other

    def reset(self) -> None:
        """Starts over and forgets all turns."""
        self._position, self._past = _Position(messages=start_of(self._system)), ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the state with the last reply closed, so that any turn may follow.

        Raises:
          ConfigError: there is no turn to save, or as `Session.save`.
        """
        position = self._position
        if position.snapshot is None:
            raise ConfigError(f"{path}: there is nothing to save: no reply has been kept")
        session = Session(self._engine, position.snapshot)
        if position.before_reply is not None and isinstance(self._template, ChatFormat):
            # The stop string may have begun the next turn: prefill the reply again without it.
            session = Session(self._engine, position.before_reply)
            session.append(position.reply + self._template.closing(position.reply))
        elif position.before_reply is not None:
            session, _ = self._read_anew(position.messages, position, add_generation_prompt=False)
        session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a file saved by `save` or by a session whose last turn is closed; forgets all turns.

        Raises:
          StateError: the state of another model or tokenizer.
          ConfigError: no such file, or a damaged one.
        """
        session = Session.load(self._engine, path)
        tail = self._template.separator if isinstance(self._template, ChatFormat) else ""
        self._position, self._past = _Position(session.snapshot, start=session.snapshot, tail=tail), ()

    def _read(self, messages: tuple[Message, ...], before: _Position) -> tuple[Session, str]:
        """A session that has read up to the reply to the last message, and the text that ends there."""
        if not isinstance(self._template, ChatFormat):
            return self._read_anew(messages, before)
        message = messages[-1].content
        session = Session(self._engine, before.snapshot)
        if before.snapshot is None:
            prompt = self._template.first_turn(message, self._system)
        else:
            prompt = self._template.next_turn(message, before.tail)
        session.append(prompt)
        return session, prompt

    def _read_anew(
        self, messages: tuple[Message, ...], before: _Position, *, add_generation_prompt: bool = True
    ) -> tuple[Session, str]:
        text = self._template.render(messages, thinking=self._thinking, add_generation_prompt=add_generation_prompt)
        if before.before_reply is not None and text.startswith(before.prompt):
            session, new = Session(self._engine, before.before_reply), text[len(before.prompt) :]
        else:
            session, new = Session(self._engine, before.start), text
        if new:
            session.append(new)
        return session, text
