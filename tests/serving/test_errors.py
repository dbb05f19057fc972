"""Errors have OpenAI's form, whatever has gone wrong."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from pydantic import Field
from starlette.testclient import TestClient

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.engine.requests import NotFiniteError, QueueFullError
from rwkv_jax.inference.state.snapshot import StateError
from rwkv_jax.serving import errors
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.base import RequestBody

RAISED = {
    "api": (APIError(413, "too long", param="prompt", code="too_long", headers={"X-Limit": "1"}), 413),
    "config": (ConfigError("top_p = 2.0: must be a number from 0 to 1"), 400),
    "state": (StateError("state: is of another model"), 409),
    "queue": (QueueFullError("queue: is full"), 429),
    "finite": (NotFiniteError("the logits are not finite"), 500),
    "mistake": (KeyError("a path of ours"), 500),
}


class Part(RequestBody):
    size: int = 0


class Body(RequestBody):
    count: int = Field(ge=0)
    part: Part | None = None


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    errors.install(app)

    @app.get("/raises/{name}")
    async def raises(name: str) -> None:
        raise RAISED[name][0]

    @app.post("/body")
    async def body(body: Body) -> int:
        return body.count

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("name", RAISED)
def test_every_error_has_a_status_and_says_what_is_wrong(client: TestClient, name: str) -> None:
    error, status = RAISED[name]
    answer = client.get(f"/raises/{name}")
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    if name == "mistake":
        assert "path" not in answer.text
    else:
        assert answer.json()["error"]["message"] == str(error)


def test_the_field_and_the_headers() -> None:
    config = errors.as_api_error(RAISED["config"][0])
    assert (config.param, config.kind) == ("top_p", "invalid_request_error")
    assert errors.as_api_error(RAISED["queue"][0]).headers == {"Retry-After": "1"}
    assert errors.as_api_error(ConfigError("a sentence: with colons")).param is None
    assert errors.as_api_error(ConfigError("messages[2].content: is empty")).param == "messages[2].content"
    assert errors.as_api_error(ConfigError("stop_ids: token id 300")).param == "stop_token_ids"


def test_headers_of_an_answer(client: TestClient) -> None:
    assert client.get("/raises/api").headers["X-Limit"] == "1"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ('{"count": 1, "storee": true}', "storee", "storee: is not supported by this server"),
        ('{"count": 1, "part": {"sizes": 1}}', "part.sizes", "part.sizes: is not supported"),
        ('{"count": "1"}', "count", "count: Input should be a valid integer"),
        ('{"count": true}', "count", "count: Input should be a valid integer"),
        ('{"count": -1}', "count", "count: Input should be greater than"),
        ('{"count": NaN}', "count", "count: Input should be a valid integer"),
        ("{}", "count", "count: Field required"),
        ("{", None, "the body is not JSON"),
        ("[]", None, "body: Input should be a valid dictionary"),
        ("", None, "body: Field required"),
    ],
)
def test_bodies_that_are_wrong_are_named_by_their_field(
    client: TestClient, body: str, param: str | None, message: str
) -> None:
    answer = client.post("/body", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)


def test_paths_that_are_not_there(client: TestClient) -> None:
    answer = client.get("/nowhere")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found")
    assert client.get("/body").status_code == 405
