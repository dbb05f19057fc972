"""/v1/responses: OpenAI's newer API, in its text subset, as the chat API with other names."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter
from sse_starlette import EventSourceResponse

from rwkv_jax.serving.errors import APIError, as_api_error
from rwkv_jax.serving.protocol.chat import ChatChunk, ChatCompletion
from rwkv_jax.serving.protocol.responses import Response, ResponseBody, Status
from rwkv_jax.serving.response_events import Part, ResponseEvents, finished, item_of, new_id
from rwkv_jax.serving.routes.chat import ChatAnswer, prepare
from rwkv_jax.serving.service import Service, ServiceOf, TenantOf
from rwkv_jax.serving.states.turns import NOT_FOUND
from rwkv_jax.serving.texts import submit

router = APIRouter(tags=["responses"])

_PREFIX = "resp_"


@router.post("/v1/responses", response_model=Response)
async def respond(body: ResponseBody, service: ServiceOf, tenant: TenantOf) -> Response | EventSourceResponse:
    """Responds to a message or a conversation."""
    head = begun(body, service)
    answer = await _prepare(body, head.id, service, tenant)
    if not body.stream:
        return ended(head, await answer.whole())
    stream = await submit(service, answer.job)
    return EventSourceResponse(_events(answer.pieces(stream, with_usage=True), ResponseEvents(head)), sep="\n")


async def _prepare(body: ResponseBody, id: str, service: Service, tenant: str) -> ChatAnswer:
    """What the chat API would answer, after the previous response."""
    previous = body.previous_response_id
    unknown = APIError(
        404,
        f"previous_response_id = {previous!r}: not found or expired; only responses to requests with store = true are",
        param="previous_response_id",
        code="previous_response_not_found",
    )
    if previous is not None and not previous.startswith(_PREFIX):  # a state that is no response's
        raise unknown
    try:
        return await prepare(body.as_chat(), service, tenant, keep_as=id)
    except APIError as error:
        if error.code == NOT_FOUND:
            raise unknown from error
        raise


def begun(body: ResponseBody, service: Service) -> Response:
    """A response before its text."""
    return Response(
        id=f"{_PREFIX}{secrets.token_hex(16)}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=body.model,
        output=[],
        previous_response_id=body.previous_response_id,
        store=bool(body.store),
        temperature=body.temperature,
        top_p=body.top_p,
        user=body.user,
    )


def ended(head: Response, chat: ChatCompletion) -> Response:
    """A response with its text."""
    (choice,) = chat.choices
    assert chat.usage is not None  # only streams may leave it out
    texts: dict[Part, str] = {}
    if choice.message.reasoning_content:
        texts["reasoning_text"] = choice.message.reasoning_content
    texts["output_text"] = choice.message.content or ""
    statuses: list[Status] = ["completed"] * len(texts)
    if choice.finish_reason == "length":
        statuses[-1] = "incomplete"
    pairs = zip(texts.items(), statuses, strict=True)
    output = [item_of(part, text, status, new_id(part)) for (part, text), status in pairs]
    return finished(head, output, choice.finish_reason, chat.usage)


async def _events(chunks: AsyncIterator[ChatChunk], events: ResponseEvents) -> AsyncIterator[dict[str, str]]:
    """Server-sent events, each named by its type."""
    try:
        for event in events.begin():
            yield {"event": event["type"], "data": json.dumps(event)}
        async for chunk in chunks:
            for event in events.push(chunk):
                yield {"event": event["type"], "data": json.dumps(event)}
    except Exception as error:
        found = as_api_error(error)
        yield {"event": "error", "data": json.dumps(events.error(found.message, found.code, found.param))}
