"""Who gets in: keys, tenants, rates, other pages of a browser."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from rwkv_jax.serving.access import Access, LocalHosts, TenantLimits, TokenBucket
from rwkv_jax.serving.keys import ApiKeys
from tests.serving.asgi import Answer, Client, ask

KEYS = ApiKeys([(hashlib.sha256(name.encode()).digest(), name) for name in ("alice", "bob")])


async def tenant_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the tenant."""
    body = repr(scope["state"]["tenant"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class WaitingApp:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_answer.wait()
        await tenant_app(scope, receive, send)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def get(path: str, headers: dict[str, str] | None = None, **options: Any) -> Answer:
    return asyncio.run(ask(Access(tenant_app, **options), "GET", path, headers=headers))


def test_the_key_says_who_the_tenant_is() -> None:
    assert get("/v1/models", bearer("bob"), keys=KEYS).body == b"'bob'"
    assert get("/v1/models", {"Authorization": "bearer  alice "}, keys=KEYS).body == b"'alice'"
    assert get("/v1/models", bearer("bob")).body == b"''"  # without a file of keys


@pytest.mark.parametrize("headers", [{}, bearer("eve"), bearer(""), {"Authorization": "Basic YWxpY2U="}])
def test_without_a_key_there_are_the_page_and_health_only(headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/v1/states/x", "/tokenize", "/openapi.json", "//health", "/health/"):
        answer = get(path, headers, keys=KEYS)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health"):
        assert get(path, headers, keys=KEYS).body == b"''"


def test_a_bucket_fills_with_time() -> None:
    clock = Clock()
    bucket = TokenBucket(3, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(20)
    clock.now = 19
    assert bucket.take() == pytest.approx(1)
    clock.now = 20
    assert bucket.take() == 0
    clock.now = 1e6  # never more than a minute's
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


def test_each_tenant_has_a_rate_of_its_own() -> None:
    clock = Clock()
    app = Access(tenant_app, keys=KEYS, limits=TenantLimits(requests_per_minute=2), clock=clock)

    def status(name: str, path: str = "/v1/models") -> tuple[int, str | None]:
        answer = asyncio.run(ask(app, "GET", path, headers=bearer(name)))
        return answer.status, answer.headers.get("retry-after")

    assert [status("alice") for _ in range(3)] == [(200, None), (200, None), (429, "30")]
    assert status("bob") == (200, None)
    assert status("alice", "/metrics") == status("alice", "/health") == (200, None)
    clock.now = 30.0
    assert [status("alice")[0] for _ in range(2)] == [200, 429]


def test_as_many_requests_at_once_as_the_limit_says() -> None:
    async def main() -> None:
        inner = WaitingApp()
        app = Access(inner, keys=KEYS, limits=TenantLimits(max_concurrent=2))

        def start(name: str) -> asyncio.Task[Answer]:
            return asyncio.create_task(Client(app, "GET", "/v1/models", headers=bearer(name)).run())

        running = [start("alice"), start("alice"), start("bob")]
        await asyncio.sleep(0)
        refused = await start("alice")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        running[0].cancel()
        await asyncio.sleep(0)
        running.append(start("alice"))  # in place of the cancelled one
        await asyncio.sleep(0)
        inner.may_answer.set()
        assert [answer.status for answer in await asyncio.gather(*running[1:])] == [200, 200, 200]
        assert (await start("alice")).status == 200

    asyncio.run(main())


def test_pages_of_other_origins_are_refused() -> None:
    def status(origin: str, **options: Any) -> int:
        return get("/v1/models", {"Origin": origin}, **options).status

    assert status("http://127.0.0.1:8000") == 200  # the page of this server
    for origin in ("http://evil.example", "http://127.0.0.1:8001", "null", "http://127.0.0.1:8000.evil.example"):
        assert status(origin) == 403
    assert status("http://a.example", cors_origins=("http://a.example",)) == 200
    assert status("http://b.example", cors_origins=("http://a.example",)) == 403
    assert status("http://b.example", cors_origins=("*",)) == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("127.9.9.9", 200),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("user@evil.example", 421),
        ("", 421),
        ("[", 421),
        ("[::1", 421),
    ],
)
def test_a_local_server_goes_by_its_own_names_only(host: str, status: int) -> None:
    client = Client(LocalHosts(Access(tenant_app)), "GET", "/v1/models", headers={"Host": host})
    assert asyncio.run(client.run()).status == status
