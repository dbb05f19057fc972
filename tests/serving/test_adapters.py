"""Adapters by the names of models: which are listed, whose texts come back, and whose states they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.service import Service
from tests.inference.models import CONFIGS, OPTIONS, VOCAB_SIZE, random_model
from tests.inference.test_engine_adapters import ADAPTERS
from tests.programs import compiled_quickly


@pytest.fixture(scope="module")
def client(compiled_programs: None) -> Iterator[TestClient]:
    options, tokenizer = EngineOptions(**OPTIONS), ByteTokenizer(VOCAB_SIZE)
    model = random_model(CONFIGS["7"])
    with compiled_quickly(), Engine(model, tokenizer, options, adapters=ADAPTERS) as engine:
        service = Service(engine, "tiny")
        with TestClient(create_app(service), raise_server_exceptions=False) as client:
            yield client


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
    return client.post("/v1/completions", json=body)


def test_adapters_are_listed_behind_their_model(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        ("tiny", None),
        ("low", "tiny"),
        ("sums", "tiny"),
        ("part", "tiny"),
    ]
    assert client.get("/v1/models/tiny:low").json()["id"] == "low"
    answer = complete(client, "tiny:gone")
    assert answer.status_code == 404
    assert "there is 'tiny', 'low', 'sums', 'part' here" in answer.json()["error"]["message"]


def test_each_name_has_its_text(client: TestClient) -> None:
    answers = {model: complete(client, model).json() for model in ("tiny", "low", "tiny:low", "sums")}
    texts = {model: answer["choices"][0]["text"] for model, answer in answers.items()}
    assert texts["low"] == texts["tiny:low"]
    assert len({texts["tiny"], texts["low"], texts["sums"]}) == 3
    assert [answer["model"] for answer in answers.values()] == list(answers)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    chats = {
        model: client.post("/v1/chat/completions", json=body | {"model": model}).json() for model in ("tiny", "low")
    }
    assert chats["low"]["model"] == "low"
    assert chats["low"]["choices"][0]["message"]["content"] != chats["tiny"]["choices"][0]["message"]["content"]


def test_states_and_sessions_are_of_one_adapter(client: TestClient) -> None:
    made = client.post("/v1/states", json={"id": "s", "prompt": "Hello", "model": "low"})
    assert made.status_code == 200
    own = complete(client, "low", prompt="!", state="s")
    assert own.json()["choices"][0]["text"] == complete(client, "low", prompt="Hello!").json()["choices"][0]["text"]
    for model in ("tiny", "sums"):
        answer = complete(client, model, prompt="!", state="s")
        assert answer.status_code in (400, 409)
        assert "choose the adapter that it was made with" in answer.json()["error"]["message"]
    assert complete(client, "low", session="talk").status_code == 200
    assert complete(client, "low", prompt="!", session="talk").status_code == 200
    assert complete(client, "tiny", prompt="!", session="talk").status_code in (400, 409)


def test_echoed_prompts_are_scored_with_the_adapter(client: TestClient) -> None:
    scores = [
        complete(client, model, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]["logprobs"]["token_logprobs"]
        for model in ("tiny", "low")
    ]
    assert scores[0][1:] != scores[1][1:]


def test_embeddings_are_the_models_own(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"model": "low", "input": "Hello"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
