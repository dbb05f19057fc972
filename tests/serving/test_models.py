"""/v1/models."""

from __future__ import annotations

from starlette.testclient import TestClient

from rwkv_jax.serving.service import Service


def test_the_model_is_listed_and_found_by_its_name(client: TestClient, service: Service) -> None:
    model = {"id": "tiny", "object": "model", "created": service.created, "owned_by": "rwkv-jax"}
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/tiny").json() == model


def test_another_model_is_not_there(client: TestClient) -> None:
    answer = client.get("/v1/models/gpt/4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert answer.json()["error"]["message"] == "model = 'gpt/4': there is only 'tiny' here"
