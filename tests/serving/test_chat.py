"""/v1/chat/completions: replies of the engine to what the template writes, in parts, whole and streamed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.chat.formats import G1, WORLD
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.serving.protocol.chat import ChatBody
from rwkv_jax.serving.routes.chat import as_job, render
from rwkv_jax.serving.service import Service
from tests.serving import calls

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello, caf\u00e9"}]
PROMPT = "System: Be short.\n\nUser: Hello, caf\u00e9\n\nAssistant:"
GREEDY = {"model": "tiny", "temperature": 0, "messages": MESSAGES, "max_tokens": 10}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"place": {}}}}}
OTHER = {"type": "function", "function": {"name": "time"}}
CALL = '```json\n{"name": "weather", "arguments": {"place": "Oslo"}}\n```'


def prompt_of(service: Service, **fields: Any) -> str:
    return render(ChatBody.model_validate(GREEDY | fields), service)


def deltas(pieces: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice["delta"] for piece in pieces for choice in piece["choices"] if choice["index"] == index]


def joined(pieces: list[dict[str, Any]], name: str, index: int = 0) -> str:
    return "".join(delta.get(name, "") for delta in deltas(pieces, index))


def test_a_greedy_reply_is_the_engines_whole_and_streamed(client: TestClient, engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=10, sampling="greedy", stop=G1.stop_strings)
    parser = G1.reply_parser(PROMPT)
    shown = "".join(delta.text for delta in (*parser.push(expected.text), *parser.flush()) if delta.kind == "content")
    answer = calls.post(client, PATH, GREEDY)
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": shown, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == (expected.finish_reason, None)
    read = len(engine.encode(PROMPT, begins=True))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (read, len(expected.ids))
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": read}  # the engine has just read it
    pieces = calls.streamed(client, PATH, GREEDY | {"stream_options": {"include_usage": True}})
    assert deltas(pieces)[0] == {"role": "assistant", "content": ""}
    assert joined(pieces, "content") == shown
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]][-1] == expected.finish_reason
    assert (pieces[-1]["choices"], pieces[-1]["usage"]) == ([], answer["usage"])
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}


def test_several_replies_with_logprobs(client: TestClient, engine: Engine) -> None:
    fields = GREEDY | {"n": 2, "seed": 3, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    answer = calls.post(client, PATH, fields)
    expected = engine.generate([PROMPT] * 2, max_tokens=10, seed=3, stop=G1.stop_strings)
    for choice, text in zip(answer["choices"], expected, strict=True):
        tokens = choice["logprobs"]["content"]
        assert [token["logprob"] for token in tokens] == pytest.approx(text.logprobs, abs=1e-5)
        assert b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace") == text.text
        assert [len(token["top_logprobs"]) for token in tokens] == [2] * len(text.ids)
    pieces = calls.streamed(client, PATH, fields)
    for choice in answer["choices"]:
        own = [each for piece in pieces for each in piece["choices"] if each["index"] == choice["index"]]
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        tokens = [token for each in own if each["logprobs"] for token in each["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]


def test_prompts_are_the_templates(service: Service) -> None:
    assert prompt_of(service) == PROMPT
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "caf\u00e9"}]
    assert (
        prompt_of(service, messages=[MESSAGES[0] | {"role": "developer"}, {"role": "user", "content": parts}]) == PROMPT
    )
    begun = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    assert prompt_of(service, messages=begun, continue_final_message=True) == PROMPT + " Well,"
    assert prompt_of(service, add_generation_prompt=False) == PROMPT.removesuffix("\n\nAssistant:")
    assert prompt_of(service, reasoning_effort="high").endswith("caf\u00e9 (think a lot)\n\nAssistant: <think")
    assert prompt_of(service, reasoning_effort="none").endswith("Assistant: <think></think")
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    assert prompt_of(service, **thinks) == PROMPT + " <think"
    assert prompt_of(service, chat_template_kwargs={"thinking": "closed"}) == PROMPT + " <think>\n</think"


def test_tools_are_shown_as_they_are_to_be_used(service: Service) -> None:
    assert prompt_of(service, tools=[TOOL], tool_choice="none") == PROMPT
    auto = prompt_of(service, tools=[TOOL, OTHER])
    assert '"name":"weather"' in auto
    assert auto.endswith("Assistant:")
    assert prompt_of(service, tools=[TOOL], tool_choice="required").endswith("Assistant: ```json")
    named = prompt_of(service, tools=[TOOL, OTHER], tool_choice={"type": "function", "function": {"name": "time"}})
    assert '"name":"weather"' not in named
    assert named.endswith("Assistant: ```json")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
    assert prompt_of(service, messages=turns).endswith("User: Function output:\nrain\n\nAssistant:")


def test_fields_become_the_engines_arguments(service: Service, engine: Engine) -> None:
    body = ChatBody.model_validate(GREEDY | {"n": 2, "stop": "x", "seed": 7, "top_logprobs": 4, "logprobs": True})
    job = as_job(body, PROMPT, service, "tenant")
    arguments: dict[str, Any] = dict(job.arguments)
    assert job.prompts == [engine.encode(PROMPT, begins=True)] * 2
    assert (arguments["stop"], arguments["seed"]) == ([*G1.stop_strings, "x"], [7, 8])
    assert (arguments["max_tokens"], arguments["top_logprobs"], arguments["client_id"]) == (10, 4, "tenant")
    for fields, limit in (({}, 2048), ({"max_completion_tokens": 5}, 5)):
        body = ChatBody.model_validate({"model": "tiny", "messages": MESSAGES} | fields)
        assert dict(as_job(body, PROMPT, service, "").arguments)["max_tokens"] == limit


class Scripted:
    """A stream of one text that has been written before."""

    num_prompt_tokens, num_cached_tokens = (3,), (0,)

    def __init__(self, text: str) -> None:
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        self._chunks = iter(
            [*(Chunk(0, piece, (1,), (-0.5,)) for piece in pieces), Chunk(0, "", (), (), (), "stop", 0)]
        )

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> Chunk:
        try:
            return next(self._chunks)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None:
        pass


@pytest.fixture
def says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the model reply with a text."""
    return lambda text: monkeypatch.setattr(engine, "stream", lambda *_, **__: Scripted(text))


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "names"),
    [
        (" Hello", "Hello", None, []),
        (f" {CALL}", None, None, ["weather"]),
        (f" Let me see.\n{CALL}\n{CALL}", "Let me see.", None, ["weather", "weather"]),
        (" <think>\nHm.\n</think>\nYes", "Yes", "Hm.", []),
        (f" <think>Hm.</think>\n{CALL}", None, "Hm.", ["weather"]),
        (' ```json\n{"name": "weather"', '```json\n{"name": "weather"', None, []),
    ],
)
def test_parts_of_a_reply(
    client: TestClient, says: Any, text: str, content: str | None, reasoning: str | None, names: list[str]
) -> None:
    fields = GREEDY | {"tools": [TOOL]}
    says(text)
    (choice,) = calls.post(client, PATH, fields)["choices"]
    message = choice["message"]
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)
    found = message.get("tool_calls", [])
    assert [call["function"]["name"] for call in found] == names
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    says(text)
    pieces = calls.streamed(client, PATH, fields)
    assert joined(pieces, "content") == (content or "")
    assert joined(pieces, "reasoning_content") == (reasoning or "")
    sent = [call for delta in deltas(pieces) for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in sent] == list(range(len(names)))
    assert [call["function"] for call in sent] == [call["function"] for call in found]
    assert len({call["id"] for call in sent}) == len(names)
    assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_calls_are_text_where_there_are_no_tools(client: TestClient, says: Any) -> None:
    says(f" {CALL}")
    (choice,) = calls.post(client, PATH, GREEDY)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_reply_has_the_form_that_is_asked_for(client: TestClient, form: dict[str, Any]) -> None:
    fields = GREEDY | {"temperature": 1, "seed": 4, "max_tokens": 60} | form
    (choice,) = calls.post(client, PATH, fields)["choices"]
    assert json.loads(choice["message"]["content"])["n"] in (1, 2)
    assert choice["finish_reason"] == "stop"


def test_a_tool_that_must_be_called_is_called(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}
    fields = GREEDY | {"temperature": 1, "seed": 4, "max_tokens": 200, "tools": [tool], "tool_choice": "required"}
    (choice,) = calls.post(client, PATH, fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "count"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2)
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {}}, "audio"),
        ({"functions": []}, "functions"),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages.0.mood"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [TOOL | {"type": "web_search"}]}, "tools.0.type"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
        ({"response_format": {"type": "json_object"}, "reasoning_effort": "high"}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"thinking": "none"}}, "reasoning_effort"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_the_fields_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = calls.refused(client, PATH, GREEDY | fields)
    assert (error["param"] or "").startswith(param), error


def test_a_template_without_tools_refuses_them(service: Service) -> None:
    plain = dataclasses.replace(service, template=WORLD)
    with pytest.raises(ValueError, match=r"^tools: this chat format has none"):
        prompt_of(plain, tools=[TOOL])
