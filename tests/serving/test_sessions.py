"""Named conversations: each turn sends what is new, and is there, as a whole, before its answer ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.state.state_file import decode_snapshot
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.chat import ChatBody
from rwkv_jax.serving.service import Service
from rwkv_jax.serving.states import turns
from rwkv_jax.serving.states.opening import states_in_memory
from rwkv_jax.serving.states.store import StateRecord
from tests.inference.models import assert_same
from tests.serving import calls

PATH = "/v1/chat/completions"
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 6, "chat_template_kwargs": {"thinking": "none"}}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(autouse=True)
def emptied(service: Service) -> Iterator[None]:
    service.states = states_in_memory()
    yield
    service.states.store.close()


@pytest.fixture(scope="module")
def letters(engine: Engine) -> dict[str, Any]:
    """So that replies are letters, which encode as they were generated."""
    return GREEDY | {"logit_bias": {str(token): 50.0 for token in engine.encode("abcdefghijklm", begins=False)}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_turns_read_what_a_whole_conversation_has(
    client: TestClient, service: Service, engine: Engine, letters: dict[str, Any]
) -> None:
    messages: list[dict[str, str]] = []
    for new in ([SYSTEM, user("Hello")], [user("And then?")], [user("Go on.")]):
        answer = calls.post(client, PATH, letters | {"messages": new, "session": "tale"})
        reply = answer["choices"][0]["message"]["content"]
        messages += [*new, {"role": "assistant", "content": reply}]
        text = service.template.render(messages, thinking="none", add_generation_prompt=False)
        text = text.replace("Assistant: ", "Assistant:") + turns.closing(service.template)  # as it was generated
        ids = engine.encode(text, begins=True)
        record = service.states.store.get("", "tale")
        assert record is not None
        assert record.kind == "session"
        assert answer["state"] == {"id": None, "session": "tale", "base64": None, "num_tokens": record.num_tokens}
        assert record.num_tokens == len(ids)
        assert_same(decode_snapshot(record.data, engine.identity), engine.prefill(None, ids))


def test_a_session_streams(client: TestClient, service: Service, letters: dict[str, Any]) -> None:
    whole = [letters | {"messages": [user(text)], "session": "whole"} for text in ("Hello", "More")]
    replies = [calls.post(client, PATH, body)["choices"][0]["message"]["content"] for body in whole]
    for body, reply in zip(whole, replies, strict=True):
        chunks = calls.streamed(client, PATH, body | {"session": "streamed"})
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == reply
        assert [chunk["state"]["session"] for chunk in chunks if "state" in chunk] == ["streamed"]
        assert "state" in chunks[-1]
    first, second = (service.states.store.get("", name) for name in ("whole", "streamed"))
    assert first is not None
    assert second is not None
    assert first.num_tokens == second.num_tokens


def test_a_session_is_forked_by_its_name(client: TestClient, letters: dict[str, Any]) -> None:
    def reply(**fields: Any) -> str:
        return calls.post(client, PATH, letters | fields)["choices"][0]["message"]["content"]

    reply(messages=[user("Hello")], session="a")
    other = reply(messages=[user("Left?")], state="a", session="b")
    once = reply(messages=[user("Right?")], state="a")
    assert reply(messages=[user("Left?")], session="a") == other
    assert once
    body = letters | {"messages": [user("x")], "session": "a", "state": "b"}
    assert "has one already" in error(client.post(PATH, json=body), 409)["message"]


def test_a_session_that_must_be_there(client: TestClient, letters: dict[str, Any]) -> None:
    body = letters | {"messages": [user("Hello")], "session": "a", "state": "a"}
    assert error(client.post(PATH, json=body), 404)["message"] == "state 'a': not found or expired"
    first = calls.post(client, PATH, body | {"state": None})["state"]["num_tokens"]
    assert calls.post(client, PATH, body)["state"]["num_tokens"] > first


def test_a_state_of_messages_is_a_first_message(client: TestClient, letters: dict[str, Any]) -> None:
    made = calls.post(client, "/v1/states", {"messages": [SYSTEM]})
    replies = [
        calls.post(client, PATH, letters | fields)["choices"][0]["message"]["content"]
        for fields in ({"state": made["id"], "messages": [user("Hello")]}, {"messages": [SYSTEM, user("Hello")]})
    ]
    assert replies[0] == replies[1]


def test_names_are_states_or_sessions(client: TestClient, letters: dict[str, Any]) -> None:
    calls.post(client, "/v1/states", {"prompt": "x", "id": "a"})
    body = letters | {"messages": [user("Hello")], "session": "a"}
    assert "is a state, not a session" in error(client.post(PATH, json=body), 409)["message"]
    content = client.get("/v1/states/a").content
    assert client.put("/v1/states/b?kind=session", content=content).json()["kind"] == "session"
    calls.post(client, PATH, body | {"session": "b"})
    assert error(client.put("/v1/states/b?kind=x", content=content), 400)["param"] == "kind"


# Turns at the same time, and turns that do not end.


def fields(letters: dict[str, Any], **more: Any) -> ChatBody:
    return ChatBody.model_validate(letters | {"messages": [user("Hello")], "session": "s"} | more)


def test_one_turn_at_a_time(service: Service, client: TestClient, letters: dict[str, Any]) -> None:
    async def check() -> None:
        turn = await turns.open_turn(service, "", fields(letters))
        with pytest.raises(APIError, match="another turn of it is being answered") as busy:
            await turns.open_turn(service, "", fields(letters))
        assert (busy.value.status, busy.value.code) == (409, "session_busy")
        await turns.open_turn(service, "another", fields(letters))
        turn.close()
        (await turns.open_turn(service, "", fields(letters))).close()
        # One that was dropped, as where a client is gone before its stream has begun.
        turn = await turns.open_turn(service, "", fields(letters))
        del turn
        gc.collect()
        (await turns.open_turn(service, "", fields(letters))).close()
        with pytest.raises(APIError, match="not found"):
            await turns.open_turn(service, "", fields(letters, state="nowhere"))
        (await turns.open_turn(service, "", fields(letters))).close()

    asyncio.run(check())
    body = letters | {"messages": [user("Hello")], "session": "s"}
    assert error(client.post(PATH, json=body | {"max_tokens": -1}), 400)
    assert calls.post(client, PATH, body)


def test_a_turn_that_another_server_was_faster_with(
    service: Service, client: TestClient, letters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = letters | {"messages": [user("Hello")], "session": "s"}
    calls.post(client, PATH, body)
    store, put = service.states.store, service.states.store.put

    def late(tenant: str, id: str, record: StateRecord, *, expected: int | None = None) -> int:
        if expected is not None:  # the other's turn, just before this one's
            put(tenant, id, StateRecord(b"theirs", 1, "m", 0.0, "session"))
        return put(tenant, id, record, expected=expected)

    monkeypatch.setattr(store, "put", late)
    answer = error(client.post(PATH, json=body | {"return_state": "id"}), 409)
    assert answer["code"] == "state_conflict"
    record = store.get("", "s")
    assert record is not None
    assert record.data == b"theirs"
    assert [info.id for info in store.list("")] == ["s"]  # not the state of which nobody was told


def test_a_turn_that_is_interrupted_changes_nothing(
    service: Service, client: TestClient, engine: Engine, letters: dict[str, Any]
) -> None:
    body = letters | {"messages": [user("Hello")], "session": "s"}
    calls.post(client, PATH, body)
    before = service.states.store.get("", "s")

    async def leave_early() -> None:
        """Disconnects after the first chunks."""
        import json

        from rwkv_jax.serving.app import create_app

        content = json.dumps(body | {"stream": True, "max_tokens": 500}).encode()
        received: list[dict[str, Any]] = [{"type": "http.request", "body": content, "more_body": False}]
        gone = asyncio.Event()
        sent = 0

        async def receive() -> dict[str, Any]:
            if received:
                return received.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal sent
            sent += 1
            if sent == 5:
                gone.set()

        headers = [(b"content-type", b"application/json")]
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "headers": headers,
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await create_app(service)(scope, receive, send)

    asyncio.run(leave_early())
    assert service.states.store.get("", "s") == before
    assert dict(service.states.busy) == {}
    calls.post(client, PATH, body)


# Text between turns.


@pytest.mark.parametrize("template", [WORLD, G1, RAVEN, PILE_QA], ids=["world", "g1", "raven", "pile"])
def test_text_after_a_reply_makes_up_the_whole(template: ChatTemplate) -> None:
    first = [user("Hello"), {"role": "assistant", "content": "Well, yes."}]
    new = [user("And then?")]
    begin = template.render(first[:1])
    reply = template.render(first, add_generation_prompt=False).removeprefix(begin)
    parts = begin + reply + turns.closing(template)
    assert parts + turns.render_after(_read(9), template, new) == template.render([*first, *new])
    assert (
        turns.render_after(_read(1), template, new) == turns.render_after(None, template, new) == template.render(new)
    )


def test_results_of_tools_after_a_state() -> None:
    calls_ = [{"id": i, "type": "function", "function": {"name": "now", "arguments": "{}"}} for i in "xy"]
    results = [{"role": "tool", "content": "noon", "tool_call_id": i} for i in "xy"]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    whole = G1.render(
        [user("Hello"), {"role": "assistant", "content": "", "tool_calls": calls_}, *results], tools=tools
    )
    after = turns.render_after(_read(9), G1, results, tools=tools)
    assert whole.endswith("\n\n" + after)
    assert after.startswith("User: Function output")


def _read(num_tokens: int) -> Any:
    class Read:
        pass

    read: Any = Read()
    read.num_tokens = num_tokens
    return read


class _Rewriting:
    """As templates that drop what was thought in all but the last message."""

    stop_strings = ()

    def render(self, messages: Sequence[Any], **arguments: Any) -> str:
        return f"{len(messages)} messages"


def test_a_template_that_rewrites_is_refused() -> None:
    template: Any = _Rewriting()
    with pytest.raises(ConfigError, match="writes messages otherwise once others follow"):
        turns.render_after(_read(9), template, [user("x")])
