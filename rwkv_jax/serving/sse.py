"""Streams of answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Set

from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from rwkv_jax.serving.errors import as_api_error

DONE = "[DONE]"
"""Ends a stream."""


def event_stream(answers: AsyncIterator[BaseModel], *, omits: Set[str] = frozenset()) -> EventSourceResponse:
    """Sends answers as they come, then `[DONE]`.

    An error in the midst of a stream, whose status has been sent, is its last event. A client that disconnects closes
    `answers`.

    Args:
      omits: fields that are left out of every answer.
    """

    async def events() -> AsyncIterator[dict[str, str]]:
        try:
            async for answer in answers:
                yield {"data": answer.model_dump_json(exclude=set(omits))}
        except Exception as error:
            yield {"data": json.dumps(as_api_error(error).body)}
        else:
            yield {"data": DONE}

    return EventSourceResponse(events(), sep="\n")
