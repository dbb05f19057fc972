"""What a request continues and what it leaves: states by id, sessions, and the text around messages between turns.

    with await open_turn(service, tenant, body, num_texts=1) as turn:
        text = turn.render(template, messages)                      # chat: only what the state has not read
        ids = engine.encode(text, begins=not turn.continues)
        stream = engine.stream([ids], **turn.arguments())
        ...                                                         # all chunks, the last one not yet sent
        kept = await turn.keep(stream, ids, chunks, closing=closing(template))
        ...                                                         # the last chunk, with kept

A state that is kept has read the prompt, the answer as the client has seen it, and `closing`. A stop string or id that
the model wrote is not in it: where there was one, the answer is read anew, in parallel. A turn that does not reach
`keep` changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import anyio.to_thread

from rwkv_jax.chat.messages import Message, ToolCall
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.checks import ConfigError
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.prompts import Arguments
from rwkv_jax.inference.engine.requests import Chunk, Completion, join
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.state_fields import MAX_ID_LENGTH, KeptState, StateFields
from rwkv_jax.serving.service import Service
from rwkv_jax.serving.states import codec
from rwkv_jax.serving.states.store import StateRecord

NOT_FOUND = "state_not_found"
"""Code of the error about a state that is not there."""

_Result = TypeVar("_Result")
# A conversation whose text is known, to find where a reply ends.
_MESSAGE, _REPLY = Message("user", "Hello"), Message("assistant", "Yes.")


class Turn:
    """One request's state before, and what is kept after. A session is busy until its turn is closed or dropped."""

    def __init__(
        self, service: Service, tenant: str, fields: StateFields, keep_as: str | None, adapter: str | None
    ) -> None:
        """Before its state is known: see `open_turn`."""
        self._service, self._tenant, self._fields, self._keep_as = service, tenant, fields, keep_as
        self._adapter = adapter
        self._before: Snapshot | None = None
        self._record: StateRecord | None = None

    @property
    def continues(self) -> bool:
        """Whether anything has been read before: a text after it does not start with the end-of-text token."""
        return self._before is not None and self._before.num_tokens > 0

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept of the state after the answer."""
        return self._fields.session is not None or self._fields.return_state != "none"

    def arguments(self) -> Arguments:
        """Arguments of `Engine.stream`; none without states."""
        found: Arguments = {} if self._adapter is None else {"adapter": self._adapter}
        if self._before is not None:
            found["state"] = self._before
        if self.is_kept:
            found["return_state"] = True
        return found

    def render(self, template: ChatTemplate, messages: Sequence[Message | Mapping[str, Any]], **arguments: Any) -> str:
        """The text of new messages.

        Args:
          messages: those that the state has not read.
          arguments: as in `ChatTemplate.render`; tools are given again in each turn.

        Raises:
          ConfigError: as `ChatTemplate.render`; or the template writes messages otherwise once others follow.
        """
        if self._before is not None and arguments.get("continue_final_message"):
            raise ConfigError("continue_final_message: a state has read whole messages; leave state and session out")
        return render_after(self._before, template, messages, **arguments)

    async def keep(
        self, stream: Stream, prompt: Sequence[int], answer: Completion | Sequence[Chunk], *, closing: str = ""
    ) -> KeptState | None:
        """Keeps the state after the answer, which is durable when this returns; None if nothing is to be kept.

        Args:
          stream: has ended.
          prompt: token ids that it was given.
          answer: its only text, or all chunks of it.
          closing: text to read after the answer, so that the next message can follow.

        Raises:
          APIError: 409, another turn of this session was kept meanwhile; 503, the store is away. Nothing was kept.
        """
        if not self.is_kept:
            return None
        whole = answer if isinstance(answer, Completion) else join(answer, 0, len(prompt))
        return await _in_thread(lambda: self._keep(stream, prompt, whole, closing))

    def close(self) -> None:
        """Lets the session go."""
        busy, key = self._service.states.busy, (self._tenant, self._fields.session)
        if busy.get(key) is self:
            del busy[key]

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the turn if its block fails, before there is an answer that closes it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # In a thread.

    def _open(self) -> None:
        store, fields, engine = self._service.states.store, self._fields, self._service.engine
        if fields.session is not None:
            self._record = store.get(self._tenant, fields.session)
        if self._record is not None:
            if self._record.kind != "session":
                raise APIError(409, f"session = {fields.session!r}: is a state, not a session; give it as state")
            if fields.state not in (None, fields.session):
                raise APIError(409, f"state: the session {fields.session!r} has one already; leave state out")
            self._before = codec.decode(self._record.data, engine, f"session {fields.session!r}", self._adapter)
        elif fields.state is not None:
            self._before = find_state(self._service, self._tenant, fields.state, adapter=self._adapter)
        elif not fields.reads_cache():
            self._before = engine.first_snapshot(self._adapter)  # a given state does not go through the cache

    def _keep(self, stream: Stream, prompt: Sequence[int], answer: Completion, closing: str) -> KeptState:
        engine, fields = self._service.engine, self._fields
        snapshot = self._after(engine, stream, prompt, answer, closing)
        data = codec.encode(snapshot, engine, self._adapter)
        record = StateRecord(data, snapshot.num_tokens, engine.identity.model, time.time())
        kept = KeptState(num_tokens=snapshot.num_tokens, session=fields.session)
        if fields.return_state == "base64":
            kept.base64 = codec.encode_base64(data)
        if fields.return_state == "id":
            kept.id = self._keep_as or new_id()
            self._service.states.store.put(self._tenant, kept.id, record)
        if fields.session is not None:
            created = record.created if self._record is None else self._record.created
            expected = 0 if self._record is None else self._record.version
            record = dataclasses.replace(record, kind="session", created=created)
            try:
                self._service.states.store.put(self._tenant, fields.session, record, expected=expected)
            except BaseException:
                if kept.id is not None:  # which nobody is told
                    self._service.states.store.delete(self._tenant, kept.id)
                raise
        return kept

    def _after(
        self, engine: Engine, stream: Stream, prompt: Sequence[int], answer: Completion, closing: str
    ) -> Snapshot:
        """The state after the prompt, the answer as it is shown, and the closing text."""
        more = engine.tokenizer.encode(closing) if closing else []
        before = stream.snapshot if answer.stop is None else self._before
        if answer.stop is not None:
            more = [*prompt, *shown_ids(engine.tokenizer, answer), *more]
        if more:
            return engine.prefill(before, more, adapter=self._adapter)
        assert before is not None, "a text without a prompt continues something"
        return before


async def open_turn(
    service: Service,
    tenant: str,
    fields: StateFields,
    *,
    num_texts: int = 1,
    keep_as: str | None = None,
    adapter: str | None = None,
) -> Turn:
    """Finds what a request continues.

    Args:
      adapter: name of the adapter that the text is of; None for the model alone.
      keep_as: the id of a state that is returned by id; None is a new one.

    Raises:
      APIError: 404, there is no such state; 409, the session is busy, or has a state already; 413, 503.
      StateError: a state of another model.
      ConfigError: fields that do not go together.
    """
    fields.check_states(num_texts)
    turn = Turn(service, tenant, fields, keep_as, adapter)
    if fields.session is None and fields.state is None and fields.reads_cache():
        return turn
    key = (tenant, fields.session)
    if fields.session is not None:
        if key in service.states.busy:
            message = f"session = {fields.session!r}: another turn of it is being answered; wait for it"
            raise APIError(409, message, param="session", code="session_busy")
        service.states.busy[key] = turn
    try:
        await _in_thread(turn._open)
    except BaseException:
        turn.close()
        raise
    return turn


def find_state(service: Service, tenant: str, state: str, name: str = "state", adapter: str | None = None) -> Snapshot:
    """A state by its id, or from base64; blocks. Raises as `open_turn`."""
    if len(state) > MAX_ID_LENGTH:
        return codec.decode_base64(state, service.engine, name, adapter)
    return codec.decode(get_record(service, tenant, state).data, service.engine, f"{name} {state!r}", adapter)


def get_record(service: Service, tenant: str, id: str) -> StateRecord:
    """The record of an id; blocks. Raises APIError, status 404, if there is none."""
    record = service.states.store.get(tenant, id)
    if record is None:
        raise not_found(id)
    return record


def not_found(id: str) -> APIError:
    """The answer about a state that there never was, or no longer is."""
    return APIError(404, f"state {id!r}: not found or expired", param="state", code=NOT_FOUND)


def new_id() -> str:
    """A random id, which nobody guesses."""
    return f"state-{secrets.token_hex(16)}"


def shown_ids(tokenizer: Tokenizer, answer: Completion) -> list[int]:
    """Token ids of an answer's text: those generated, without the ones of a stop string."""
    if not isinstance(answer.stop, str):
        return list(answer.ids)
    count = len(answer.ids)
    while not answer.text.startswith(begin := tokenizer.decode(answer.ids[:count])):
        count -= 1
    rest = answer.text[len(begin) :]
    return [*answer.ids[:count], *(tokenizer.encode(rest) if rest else ())]


def render_after(
    snapshot: Snapshot | None, template: ChatTemplate, messages: Sequence[Message | Mapping[str, Any]], **arguments: Any
) -> str:
    """The text of messages after a state that has read others, each with its `closing`; raises as `Turn.render`."""
    if snapshot is None or snapshot.num_tokens <= 1:  # but for the token that a text starts with
        return template.render(messages, **arguments)
    calls: tuple[ToolCall, ...] = ()
    if messages and _field(messages[0], "role") == "tool":
        answering = [message for message in messages if _field(message, "role") == "tool"]
        calls = tuple(ToolCall("f", "{}", _field(message, "tool_call_id") or "") for message in answering)
    before = [_MESSAGE, dataclasses.replace(_REPLY, tool_calls=calls)]
    whole = template.render([*before, *messages], **arguments)
    arguments["add_generation_prompt"] = False
    begin = template.render(before, **arguments) + separator(template)
    if not whole.startswith(begin):
        raise ConfigError(
            "messages: this model's chat template writes messages otherwise once others follow, so that no state can "
            "continue; leave state and session out, and send the whole conversation"
        )
    return whole[len(begin) :]


def closing(template: ChatTemplate) -> str:
    """The text that ends a reply, so that any message may follow, as in the files of `rwkv chat`."""
    text = template.render([_MESSAGE, _REPLY], add_generation_prompt=False)
    return text.rpartition(_REPLY.content)[2] + separator(template)


def separator(template: ChatTemplate) -> str:
    """The text between two messages that is part of neither; empty where a template has none or hides it."""
    begin, whole, alone = (
        template.render(messages, add_generation_prompt=False)
        for messages in ([_MESSAGE, _REPLY], [_MESSAGE, _REPLY, _MESSAGE], [_MESSAGE])
    )
    if not (whole.startswith(begin) and whole.endswith(alone) and len(whole) >= len(begin) + len(alone)):
        return ""
    return whole[len(begin) : len(whole) - len(alone)]


def _field(message: Message | Mapping[str, Any], name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name)


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Runs to its end, also where the client is gone."""
    return await anyio.to_thread.run_sync(work)
