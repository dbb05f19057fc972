"""The life of a request: its deadline, its client, the server's end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_jax.serving.drain import Lifetime, Running
from tests.serving.asgi import Client, ask


class Recorder:
    """An app that sends what it is told to and then waits; counts how often it was cancelled."""

    def __init__(self, *messages: Message, waits: bool = True) -> None:
        self.messages, self.waits, self.num_cancelled = messages, waits, 0
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = (await receive())["body"]
        for message in self.messages:
            await send(message)
        try:
            if self.waits:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def begins(kind: str) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


EVENT: Message = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"data: 2\n\n"}


def lifetime(app: ASGIApp, running: Running, seconds: float = 30.0) -> Lifetime:
    return Lifetime(app, running=running, timeout_seconds=seconds, max_body_bytes=100)


def run(test: Callable[[Running], Awaitable[None]]) -> None:
    """Runs a test, after which nothing may be left running."""

    async def main() -> None:
        running = Running()
        await test(running)
        assert len(running) == 0

    asyncio.run(main())


def test_a_request_passes_unchanged() -> None:
    async def test(running: Running) -> None:
        app = Recorder(begins("text/plain"), EVENT, END, waits=False)
        answer = await Client(lifetime(app, running), "POST", "/v1/x", parts=(b"ab", b"cd")).run()
        assert (app.body, answer.status, answer.body) == (b"abcd", 200, b"data: 1\n\ndata: 2\n\n")

    run(test)


def test_a_request_ends_at_its_deadline() -> None:
    async def test(running: Running) -> None:
        waiting, streaming, plain = (
            Recorder(),
            Recorder(begins("text/event-stream"), EVENT),
            Recorder(begins("a/b"), EVENT),
        )
        late = await ask(lifetime(waiting, running, 0.02), "POST", "/v1/x")
        assert (late.status, late.error["code"], late.error["type"]) == (504, "timeout", "server_error")
        stream = await ask(lifetime(streaming, running, 0.02), "POST", "/v1/x")
        first, last, rest = stream.body.split(b"\n\n")
        assert (first, rest, stream.is_complete) == (b"data: 1", b"", True)
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
        half = await ask(lifetime(plain, running, 0.02), "POST", "/v1/x")
        assert (half.body, half.is_complete) == (b"data: 1\n\n", False)  # nothing can be said any more
        assert waiting.num_cancelled == streaming.num_cancelled == plain.num_cancelled == 1

    run(test)


def test_a_body_that_does_not_arrive_ends_too() -> None:
    async def test(running: Running) -> None:
        app = Recorder(waits=False)
        answer = await Client(lifetime(app, running, 0.02), "POST", "/v1/x", parts=None).run()
        assert (answer.status, answer.error["code"]) == (408, "timeout")
        large = await ask(lifetime(app, running), "POST", "/v1/x", b"x" * 101)
        assert (large.status, large.error["code"]) == (413, "request_too_large")
        assert app.body == b""

    run(test)


def test_a_client_that_leaves_ends_its_request() -> None:
    async def test(running: Running) -> None:
        for app in (Recorder(), Recorder(begins("text/event-stream"), EVENT)):
            client = Client(lifetime(app, running), "POST", "/v1/x")
            task = asyncio.create_task(client.run())
            await asyncio.sleep(0.01)
            assert (len(running), app.num_cancelled) == (1, 0)
            client.disconnect()
            await asyncio.wait_for(task, 1)
            assert app.num_cancelled == 1
            assert client.answer.body == b"".join(message.get("body", b"") for message in app.messages)
        never_sent = Client(lifetime(Recorder(), running), "POST", "/v1/x", parts=None)
        never_sent.disconnect()
        assert (await never_sent.run()).status == 0

    run(test)


def test_what_runs_after_the_response_is_not_cancelled() -> None:
    async def test(running: Running) -> None:
        done = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send(begins("text/plain"))
            await send(END)
            await asyncio.sleep(0.02)
            done.append(True)

        client = Client(lifetime(app, running), "POST", "/v1/x")
        task = asyncio.create_task(client.run())
        await asyncio.sleep(0.005)
        client.disconnect()
        await task
        assert done == [True]

    run(test)


def test_a_draining_server_finishes_what_runs_and_takes_no_more() -> None:
    async def test(running: Running) -> None:
        quick = Recorder(begins("text/plain"), END, waits=False)
        slow, stream = Recorder(), Recorder(begins("text/event-stream"), EVENT)
        tasks = [asyncio.create_task(ask(lifetime(app, running), "POST", "/v1/x")) for app in (slow, stream)]
        await asyncio.sleep(0.01)
        drain = asyncio.create_task(running.drain(0.1))
        await asyncio.sleep(0)
        refused = await ask(lifetime(quick, running), "POST", "/v1/x")
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "5"
        assert (await ask(lifetime(quick, running), "GET", "/metrics")).status == 200
        assert slow.num_cancelled == 0
        assert await drain == 2
        waiting, streaming = await asyncio.gather(*tasks)
        assert (waiting.status, waiting.error["code"]) == (503, "shutting_down")
        assert json.loads(streaming.body.split(b"data: ")[2])["error"]["code"] == "shutting_down"
        assert slow.num_cancelled == stream.num_cancelled == 1
        assert await running.drain(10) == 0  # at once

    run(test)
