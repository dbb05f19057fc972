"""The OpenAPI schema, and what schemathesis draws from it: no request is answered with an error of the server's."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from starlette.testclient import TestClient

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service

EXAMPLES = 30
"""Requests of each operation that its schema allows, and as many that it does not."""

LENGTHS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
}
"""Fields that say how much is generated."""


@pytest.fixture(scope="module")
def app(engine: Engine) -> FastAPI:
    return create_app(Service(engine, "tiny", ServeOptions(timeout_seconds=120)))


def answerable(body: Any, path: str) -> Any:
    """A body that names the model that there is and no state, and that asks for few tokens."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body = body | {"model": "tiny"}
    if isinstance(body.get("state"), str):
        body = {name: value for name, value in body.items() if name != "state"}
    if path not in LENGTHS:
        return body
    names = [name for name in LENGTHS[path] if body.get(name) is not None] or LENGTHS[path][:1]
    lengths = {name: body.get(name, 2) for name in names}
    return body | {name: 2 if type(value) is int and value > 2 else value for name, value in lengths.items()}


def test_every_route_is_described(app: FastAPI) -> None:
    schema = TestClient(app).get("/openapi.json").json()
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics", "/tokenize"):
        assert path in schema["paths"]


@pytest.fixture
def operations(app: FastAPI) -> list[Any]:
    import schemathesis

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [found.ok() for found in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_no_request_is_an_error_of_the_servers(app: FastAPI, operations: list[Any]) -> None:
    from schemathesis import GenerationMode

    seen: dict[str, set[int]] = {}
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=(Phase.generate,),
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                label = case.operation.label
                case.body = answerable(case.body, case.operation.path)
                answer = case.call()
                seen.setdefault(label, set()).add(answer.status_code)
                assert answer.status_code < 500, (label, case.body, answer.text)
                if answer.status_code >= 400:
                    assert json.loads(answer.text)["error"].keys() == {"message", "type", "param", "code"}

            with contextlib.suppress(Unsatisfiable):  # where there is nothing that could be wrong
                check()
    for path in ("/tokenize", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/states"):
        assert {200, 400} <= seen[f"POST {path}"]
    assert len(seen) == len(operations) >= 8
    assert TestClient(app).get("/health").status_code == 200
