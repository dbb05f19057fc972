"""Replies of a chat model in parts: what was thought, what is said, and which tools are called."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from rwkv_jax.chat.messages import ToolCall
from rwkv_jax.chat.replies import Reply, ReplyParser
from rwkv_jax.inference.engine.requests import FinishReason as EngineReason
from rwkv_jax.serving.protocol.chat import CallAnswer, Delta, FinishReason, Message, ToolCallAnswer


def message_of(text: str, parser: ReplyParser) -> Message:
    """The message that a whole reply is."""
    reply = Reply.of([*parser.push(text), *parser.flush()])
    calls = [_answer(call) for call in reply.tool_calls]
    return Message(
        content=reply.content if reply.content or not calls else None,
        reasoning_content=reply.reasoning or None,
        tool_calls=calls or None,
    )


def finish_reason_of(reason: EngineReason, has_calls: bool) -> FinishReason:
    """Why a reply has ended: `tool_calls` if it waits for those."""
    return "tool_calls" if has_calls and reason == "stop" else reason


class ReplyStream:
    """Makes the deltas of one reply as its text arrives."""

    def __init__(self, parser: ReplyParser) -> None:
        """Before the first character."""
        self._parser, self.num_calls = parser, 0

    def push(self, text: str, *, is_last: bool) -> Iterator[Delta]:
        """Deltas of the next characters; with the last ones, of all that was held back."""
        for kind, piece, call in (*self._parser.push(text), *(self._parser.flush() if is_last else ())):
            if call is not None:
                yield Delta(tool_calls=[_answer(call, self.num_calls)])
                self.num_calls += 1
            elif kind == "reasoning":
                yield Delta(reasoning_content=piece)
            elif kind == "content":
                yield Delta(content=piece)


def _answer(call: ToolCall, index: int | None = None) -> ToolCallAnswer:
    name = f"call_{uuid.uuid4().hex[:24]}"
    return ToolCallAnswer(index=index, id=name, function=CallAnswer(name=call.name, arguments=call.arguments))
