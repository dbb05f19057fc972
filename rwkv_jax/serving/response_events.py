"""The events of a response that is streamed, from the chunks of the chat API."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Literal

from rwkv_jax.serving.protocol.base import Usage
from rwkv_jax.serving.protocol.chat import ChatChunk
from rwkv_jax.serving.protocol.responses import (
    CachedTokens,
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ReasoningTokens,
    Response,
    ResponseUsage,
    Status,
)

Part = Literal["reasoning_text", "output_text"]
Event = dict[str, Any]
"""With `type` and `sequence_number`."""


def item_of(part: Part, text: str, status: Status, item_id: str) -> ReasoningItem | OutputMessage:
    """An item of a response with one part."""
    if part == "reasoning_text":
        return ReasoningItem(id=item_id, status=status, content=[ReasoningText(text=text)])
    return OutputMessage(id=item_id, status=status, content=[OutputText(text=text)])


def new_id(part: Part) -> str:
    """An id for an item."""
    return f"{'rs' if part == 'reasoning_text' else 'msg'}_{uuid.uuid4().hex}"


def finished(head: Response, output: list[ReasoningItem | OutputMessage], reason: str, usage: Usage) -> Response:
    """A response at its end, from how it began."""
    is_whole = reason != "length"
    details = usage.prompt_tokens_details
    return head.model_copy(
        update={
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else IncompleteDetails(),
            "output": output,
            "usage": ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=CachedTokens(cached_tokens=details.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=ReasoningTokens(),
                total_tokens=usage.total_tokens,
            ),
        }
    )


class ResponseEvents:
    """Makes the events of one response: of its items in turn, each with one part, and of the whole."""

    def __init__(self, head: Response) -> None:
        """Before the first chunk.

        Args:
          head: the response without output.
        """
        self._head = head
        self._number = 0
        self._output: list[ReasoningItem | OutputMessage] = []
        self._part: Part | None = None
        self._text, self._id, self._reason = "", "", "stop"

    def begin(self) -> Iterator[Event]:
        """Events before any text."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._head.model_dump())

    def push(self, chunk: ChatChunk) -> Iterator[Event]:
        """Events of a chunk, of which the last has the usage."""
        for choice in chunk.choices:
            delta = choice.delta
            if delta.reasoning_content:
                yield from self._add("reasoning_text", delta.reasoning_content)
            if delta.content:
                yield from self._add("output_text", delta.content)
            self._reason = choice.finish_reason or self._reason
        if chunk.usage is not None:
            yield from self._end(chunk.usage)

    def error(self, message: str, code: str | None, param: str | None) -> Event:
        """The event of an error, the last one."""
        return self._event("error", message=message, code=code, param=param)

    def _add(self, part: Part, text: str) -> Iterator[Event]:
        if part != self._part:
            yield from self._close()
            yield from self._open(part)
        self._text += text
        more = {"logprobs": []} if part == "output_text" else {}
        yield self._of_part(f"response.{part}.delta", delta=text, **more)

    def _open(self, part: Part) -> Iterator[Event]:
        self._part, self._text, self._id = part, "", new_id(part)
        item = item_of(part, "", "in_progress", self._id).model_dump()
        (content,) = item["content"]
        yield self._event("response.output_item.added", output_index=len(self._output), item=item | {"content": []})
        yield self._of_part("response.content_part.added", part=content)

    def _close(self, status: Status = "completed") -> Iterator[Event]:
        if self._part is None:
            return
        more = {"logprobs": []} if self._part == "output_text" else {}
        yield self._of_part(f"response.{self._part}.done", text=self._text, **more)
        item = item_of(self._part, self._text, status, self._id)
        yield self._of_part("response.content_part.done", part=item.content[0].model_dump())
        yield self._event("response.output_item.done", output_index=len(self._output), item=item.model_dump())
        self._output.append(item)
        self._part = None

    def _end(self, usage: Usage) -> Iterator[Event]:
        is_whole = self._reason != "length"
        if self._part != "output_text" and not any(isinstance(item, OutputMessage) for item in self._output):
            yield from self._close()
            yield from self._open("output_text")  # a response has a message, if an empty one
        yield from self._close("completed" if is_whole else "incomplete")
        response = finished(self._head, self._output, self._reason, usage).model_dump()
        yield self._event("response.completed" if is_whole else "response.incomplete", response=response)

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._id, output_index=len(self._output), content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number} | fields
        self._number += 1
        return event
