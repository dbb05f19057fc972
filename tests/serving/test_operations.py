"""/health, /metrics, /tokenize and /detokenize; request ids and the access log."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from rwkv_jax.serving import access_log
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Lines of the access log so far."""
    found: list[dict] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(json.loads(record.getMessage()))
    monkeypatch.setattr(access_log.LOGGER, "handlers", [handler])
    caplog.set_level(logging.INFO, access_log.LOGGER.name)
    return found


def values(client: TestClient) -> dict[tuple[str, ...], float]:
    """All values of /metrics by name and labels, in the order of their names."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_health_says_whether_requests_are_welcome(client: TestClient, service: Service) -> None:
    def health() -> tuple[int, str]:
        answer = client.get("/health")
        return answer.status_code, answer.json()["status"]

    assert health() == (200, "ok")
    service.is_warm = False
    assert health() == (503, "warming up")
    service.is_warm = True
    service.running.is_draining = True
    assert health() == (503, "shutting down")
    assert client.get("/v1/models").json()["error"]["code"] == "shutting_down"
    service.running.is_draining = False
    assert health() == (200, "ok")


def test_tokens_of_a_text_and_back(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "h\u00e9", "return_token_strs": True}).json()
    assert answer == {
        "count": 4,
        "max_model_len": None,
        "tokens": [0, 104, 195, 169],
        "token_strs": ["", "h", "\ufffd", "\ufffd"],
    }
    bare = client.post("/tokenize", json={"model": "tiny", "prompt": "h\u00e9", "add_special_tokens": False}).json()
    assert bare["tokens"] == [104, 195, 169]
    assert bare["token_strs"] is None
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == [0]
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "h\u00e9"}


def test_no_text_begins_as_the_models_texts_do(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /v1/completions reads it; other people's models do not begin with the end of a text."""
    monkeypatch.setattr(service.engine.tokenizer, "begin", (7, 8))
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == [7, 8]
    assert client.post("/tokenize", json={"prompt": "a"}).json()["tokens"] == [7, 8, 97]
    assert client.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_the_tokenizer(client: TestClient) -> None:
    expected = {"tokenizer_class": "ByteTokenizer", "vocab_size": 256, "eos_token_id": 0}
    assert client.get("/tokenizer_info").json() == expected | {"bos_token": None, "eos_token": None}


def test_a_conversation_as_a_prompt(client: TestClient, service: Service) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert prompt == service.template.render(messages)
    assert "Hi" in prompt
    open_end = client.post("/apply-template", json={"messages": messages, "add_generation_prompt": False}).json()
    assert prompt.startswith(open_end["prompt"])
    assert len(open_end["prompt"]) < len(prompt)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [{"role": "user", "text": "a"}]}, "messages.0.text"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**400]}, "tokens"),
        ("/detokenize", {"tokens": "ab"}, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "\ud800"}, "model"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, path: str, body: dict, param: str) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_every_request_has_a_line_without_its_prompt(client: TestClient, lines: list[dict]) -> None:
    prompt = "what nobody else may read"
    own = client.post("/tokenize", json={"prompt": prompt}, headers={"X-Request-Id": "mine.1"})
    made = client.get("/v1/models/gpt", headers={"X-Request-Id": "not one\n"})
    assert client.get("/nowhere?prompt=secret").status_code == 404
    assert own.headers["X-Request-Id"] == "mine.1"
    assert len(made.headers["X-Request-Id"]) == 32
    first, second, third = lines
    assert {**first, "seconds": 0, "time": ""} == {
        "time": "",
        "id": "mine.1",
        "tenant": "",
        "method": "POST",
        "route": "/tokenize",
        "status": 200,
        "seconds": 0,
    }
    assert 0 < first["seconds"] < 60
    assert (second["id"], second["route"]) == (made.headers["X-Request-Id"], "/v1/models/{name:path}")
    assert (third["status"], third["route"]) == (404, "none")
    assert prompt not in str(lines)
    assert "secret" not in str(lines)


def test_requests_are_counted_by_route_and_status(client: TestClient) -> None:
    def counts() -> tuple[float, ...]:
        found = values(client)
        names = [("POST", "/tokenize", "200"), ("POST", "/tokenize", "400"), ("GET", "none", "404")]
        return tuple(found.get(("rwkv_requests_total", *name), 0.0) for name in names)

    before = counts()
    for body in ({"prompt": "a"}, {"prompt": "b"}, {"prompt": 1}):
        client.post("/tokenize", json=body)
    client.get("/a/path/that/is/not/there")
    assert [after - count for after, count in zip(counts(), before, strict=True)] == [2, 1, 1]
    found = values(client)
    assert found["rwkv_requests_in_flight",] == 1  # this one
    assert found["rwkv_request_seconds_count", "/tokenize"] >= 3
    assert not any("a/path" in label for name in found for label in name[1:])


def test_tokens_are_logged_and_timed(client: TestClient, lines: list[dict]) -> None:
    def count(name: str) -> float:
        return values(client)[f"rwkv_time_{name}_seconds_count",]

    before = [count(name) for name in ("to_first_token", "per_token")]
    body = {"model": "tiny", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4, "n": 2, "ignore_eos": True}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    client.post("/v1/completions", json={**body, "stream": True})
    client.post("/v1/completions", json={**body, "max_tokens": 1})
    whole, streamed, _ = [line for line in lines if line["route"] == "/v1/completions"]
    for line in (whole, streamed):
        assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 16) == (5, 16)
    after = [count(name) for name in ("to_first_token", "per_token")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [12, 8]  # one token has no time between tokens


def test_what_the_engine_counts(client: TestClient, service: Service) -> None:
    before, prompt = values(client), list(range(100, 140))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "ignore_eos": True}
    for _ in range(2):
        client.post("/v1/completions", json=body)
    after = values(client)
    added = {name: value - before[name] for name, value in after.items() if name in before}
    assert added["rwkv_generated_tokens_total",] >= 6
    assert (added["rwkv_prefix_cache_hits_total",], added["rwkv_prefix_cache_misses_total",]) == (1, 1)
    assert added["rwkv_prompt_tokens_total",] + added["rwkv_cached_prompt_tokens_total",] == 80
    assert after["rwkv_prefix_cache_bytes",] == service.engine.stats().prefix_bytes > 0
    assert after["rwkv_slots",] == service.engine.options.num_slots
    assert after["rwkv_running_texts",] == after["rwkv_queued_texts",] == after["rwkv_paused_texts",] == 0


def test_long_prompts_are_refused(service: Service) -> None:
    app = create_app(Service(service.engine, "tiny", ServeOptions(max_prompt_tokens=4)))
    with TestClient(app) as client:
        body = {"model": "tiny", "max_tokens": 1, "prompt": "abc"}  # 4 tokens with that of the beginning
        assert client.post("/v1/completions", json=body).status_code == 200
        echo = {"prompt": "abcd", "echo": True, "logprobs": 1}
        for wrong in ({"prompt": "abcd"}, {"prompt": ["a", "abcd"], "n": 2}, {"prompt": "abcd", "stream": True}, echo):
            error = client.post("/v1/completions", json=body | wrong)
            assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert "max_prompt_tokens = 4" in error.json()["error"]["message"]
        embedding = client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "abcd"]})
        assert embedding.json()["error"]["code"] == "context_length_exceeded"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "abcd"}]}
        assert client.post("/v1/chat/completions", json=chat).json()["error"]["code"] == "context_length_exceeded"
        assert client.post("/tokenize", json={"prompt": "abcd"}).json()["max_model_len"] == 4


def test_each_app_counts_for_itself(service: Service) -> None:
    other = TestClient(create_app(Service(service.engine, "tiny")))
    assert not any(name[0] == "rwkv_requests_total" for name in values(other))


def test_a_mistake_of_ours_is_told_without_its_insides(service: Service, lines: list[dict]) -> None:
    app = create_app(Service(service.engine, "tiny"))

    @app.get("/fails")
    async def fails() -> None:
        raise KeyError("a path of ours")

    answer = TestClient(app).get("/fails")
    assert answer.status_code == 500
    assert "a path of ours" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["X-Request-Id"] == lines[0]["id"]
    assert lines[0]["status"] == 500


def test_cors_is_off_unless_origins_are_named(service: Service) -> None:
    asks = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    closed = TestClient(create_app(service))
    assert closed.options("/v1/models", headers=asks).status_code == 403
    options = ServeOptions(cors_origins=("http://a.example",))
    opened = TestClient(create_app(Service(service.engine, "tiny", options)))
    assert opened.options("/v1/models", headers=asks).headers["access-control-allow-origin"] == "http://a.example"
    answer = opened.get("/v1/models", headers={"Origin": "http://a.example"})
    assert answer.headers["access-control-allow-origin"] == "http://a.example"
    assert opened.get("/v1/models", headers={"Origin": "http://b.example"}).status_code == 403
