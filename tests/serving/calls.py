"""Calls of an endpoint, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

from starlette.testclient import TestClient


def post(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that is right."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a stream, which ends with [DONE]."""
    answer = client.post(path, json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def refused(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a request that is wrong."""
    # Not by json=, whose encoder refuses lone surrogates.
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]
