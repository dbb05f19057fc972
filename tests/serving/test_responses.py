"""/v1/responses: the chat API's replies as items, whole and in events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.serving.protocol.base import PromptTokensDetails, Usage
from rwkv_jax.serving.protocol.chat import (
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    Message,
)
from rwkv_jax.serving.protocol.responses import ResponseBody
from rwkv_jax.serving.response_events import ResponseEvents
from rwkv_jax.serving.routes.responses import begun, ended
from rwkv_jax.serving.service import Service
from tests.serving import calls

PATH = "/v1/responses"
GREEDY = {"model": "tiny", "temperature": 0, "input": "Hello", "max_output_tokens": 8}
USAGE = Usage(
    prompt_tokens=3, completion_tokens=2, total_tokens=5, prompt_tokens_details=PromptTokensDetails(cached_tokens=1)
)


def events_of(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each named by its type and numbered."""
    lines = client.post(PATH, json=body | {"stream": True}).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_response_is_the_chat_apis_reply_whole_and_in_events(client: TestClient) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    chat = {"model": "tiny", "temperature": 0, "messages": messages, "max_tokens": 8}
    expected = calls.post(client, "/v1/chat/completions", chat)
    body = GREEDY | {"instructions": "Be short.", "metadata": {"a": "b"}}
    response = calls.post(client, PATH, body)
    (item,) = response["output"]
    text = expected["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", text)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["metadata"], response["instructions"], response["store"]) == ({"a": "b"}, "Be short.", False)
    assert response["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert response["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]
    events = events_of(client, body)
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["content"] == item["content"]
    assert last["response"]["id"] == events[0]["response"]["id"]


def test_conversations(client: TestClient) -> None:
    first = calls.post(client, PATH, GREEDY)["output"]
    again = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}, *first]
    again.append({"type": "message", "role": "user", "content": "More"})
    assert calls.post(client, PATH, GREEDY | {"input": again})["output"][0]["type"] == "message"


def chunks_of(reasoning: str | None, content: str | None, reason: FinishReason) -> list[ChatChunk]:
    def chunk(delta: Delta, end: FinishReason | None = None) -> ChatChunk:
        return ChatChunk(
            id="c", created=1, model="tiny", choices=[ChunkChoice(index=0, delta=delta, finish_reason=end)]
        )

    pieces = [Delta(reasoning_content=piece) for piece in reasoning or ""]
    pieces += [Delta(content=piece) for piece in content or ""]
    usage = ChatChunk(id="c", created=1, model="tiny", choices=[], usage=USAGE)
    return [*map(chunk, pieces), chunk(Delta(), reason), usage]


@pytest.mark.parametrize(
    ("reasoning", "content", "reason", "items", "status"),
    [
        (None, "Yes", "stop", ["message"], "completed"),
        ("Hm", "Yes", "stop", ["reasoning", "message"], "completed"),
        ("Hm", None, "length", ["reasoning", "message"], "incomplete"),
        (None, None, "stop", ["message"], "completed"),
    ],
)
def test_items_of_a_response(
    service: Service, reasoning: str | None, content: str | None, reason: FinishReason, items: list[str], status: str
) -> None:
    head = begun(ResponseBody.model_validate(GREEDY), service)
    made = ResponseEvents(head)
    events = [*made.begin(), *(event for chunk in chunks_of(reasoning, content, reason) for event in made.push(chunk))]
    response = events[-1]["response"]
    assert [item["type"] for item in response["output"]] == items
    assert response["status"] == status == events[-1]["type"].removeprefix("response.")
    assert response["output"][-1]["status"] == status
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"]["id"] for event in events if event["type"] == "response.output_item.done"]
    assert added == done == [item["id"] for item in response["output"]]
    message = Message(content=content, reasoning_content=reasoning)
    choice = Choice(index=0, message=message, finish_reason=reason)
    whole = ended(head, ChatCompletion(id="c", created=1, model="tiny", choices=[choice], usage=USAGE)).model_dump()
    for item in (*whole["output"], *response["output"]):
        del item["id"]
    assert whole == response


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp 1"}, "previous_response_id"),
        ({"previous_response_id": "resp_1", "instructions": "Be short."}, "instructions"),
        ({"conversation": "a"}, "conversation"),
        ({"tools": []}, "tools"),
        ({"store": 1}, "store"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"temperature": -1}, "temperature"),
        ({"truncation": "auto"}, "truncation"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_the_fields_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = calls.refused(client, PATH, GREEDY | fields)
    assert (error["param"] or "").startswith(param), error


def test_text_has_the_form_that_is_asked_for(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "one", "schema": schema}}
    response = calls.post(client, PATH, GREEDY | {"text": form, "temperature": 1, "max_output_tokens": 60})
    assert json.loads(response["output"][0]["content"][0]["text"]) == {"n": 1}


def test_a_stored_response_is_continued(client: TestClient, service: Service) -> None:
    """As a session would be, whole and in events; and as often as one likes."""
    first = calls.post(client, PATH, GREEDY | {"store": True})
    assert (first["store"], first["previous_response_id"]) == (True, None)
    chat = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    for text in ("Hello", "More"):
        expected = calls.post(
            client, "/v1/chat/completions", chat | {"session": "a", "messages": [{"role": "user", "content": text}]}
        )
    for _ in range(2):
        again = GREEDY | {"input": "More", "previous_response_id": first["id"]}
        second = calls.post(client, PATH, again)
        assert second["output"][0]["content"][0]["text"] == expected["choices"][0]["message"]["content"]
        assert second["previous_response_id"] == first["id"]
        assert second["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    head, *_, last = events_of(client, again | {"store": True})
    assert last["response"]["output"][0]["content"] == second["output"][0]["content"]
    record = service.states.store.get("", head["response"]["id"])
    assert record is not None
    assert record.num_tokens > expected["usage"]["total_tokens"]
    assert service.states.store.get("", second["id"]) is None  # store is false by default


def test_a_response_that_was_not_stored_is_not_found(client: TestClient, service: Service) -> None:
    response = calls.post(client, PATH, GREEDY)
    stored = calls.post(client, PATH, GREEDY | {"store": True})["id"]
    record = service.states.store.get("", stored)
    assert record is not None
    other = "resp_of_another_tenant"
    service.states.store.put("another", other, record)
    service.states.store.put("", "plain", record)
    for previous in (response["id"], other, "plain"):
        answer = client.post(PATH, json=GREEDY | {"previous_response_id": previous})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
