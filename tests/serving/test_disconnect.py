"""A client that goes away frees the slots of its texts before its request is over, streamed or not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service
from tests.serving.asgi import Client

ENDLESS = {"max_tokens": 10**6, "ignore_eos": True, "temperature": 0.0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": ["ab", "cd"], **ENDLESS},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **ENDLESS},
}


def request(app: Any, path: str, body: dict[str, Any]) -> Client:
    return Client(app, "POST", path, parts=(json.dumps(body).encode(),), headers={"Content-Type": "application/json"})


async def until_it_runs(engine: Engine) -> None:
    while not engine.stats().num_running:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_frees_its_slots(service: Service, path: str, stream: bool) -> None:
    engine, app = service.engine, create_app(Service(service.engine, "tiny"))

    async def main() -> None:
        client = request(app, path, {**BODIES[path], "stream": stream})
        task = asyncio.create_task(client.run())
        await asyncio.wait_for(until_it_runs(engine), 30)
        while stream and client.answer.body.count(b"data:") < 4:
            await asyncio.sleep(0.001)
        client.disconnect()
        await asyncio.wait_for(task, 10)

    asyncio.run(main())
    stats = engine.stats()
    assert (stats.num_running, stats.num_queued) == (0, 0)
    assert engine.generate("ab", max_tokens=2).ids
    assert engine.stats().generated_tokens - stats.generated_tokens <= engine.options.burst_length  # of this one alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_frees_its_slots(service: Service, stream: bool) -> None:
    engine, app = service.engine, create_app(Service(service.engine, "tiny", ServeOptions(timeout_seconds=1.0)))
    body = {**BODIES["/v1/completions"], "stream": stream}
    answer = asyncio.run(request(app, "/v1/completions", body).run())
    assert (engine.stats().num_running, engine.stats().num_queued) == (0, 0)
    assert answer.is_complete
    if stream:
        last = answer.body.decode().split("data: ")[-1]
        assert json.loads(last)["error"]["code"] == "timeout"
    else:
        assert (answer.status, answer.error["code"]) == (504, "timeout")
