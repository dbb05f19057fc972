"""The life of a request: reads its body, ends it after a time, with its client, or with the server."""

from __future__ import annotations

import asyncio
import dataclasses
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_jax.serving.body import ClientGoneError, read_body
from rwkv_jax.serving.errors import APIError, ErrorResponse

_ALWAYS_OPEN = frozenset({"/health", "/metrics"})
"""Answered while the server drains."""

_LAST_WORDS_SECONDS = 5.0
"""In which cancelled requests send their error."""


@dataclasses.dataclass(eq=False)
class _Life:
    """A running request."""

    deadline: asyncio.Timeout
    reason: APIError | None
    """Why it ends at the deadline; None if nobody is there to be told."""
    is_over: bool = False
    """Whether only its last words are still to be sent."""

    def end(self, reason: APIError | None) -> None:
        """Cancels the request at the loop's next turn, unless it is being cancelled already."""
        if not self.is_over and not self.deadline.expired():
            self.reason = reason
            self.deadline.reschedule(asyncio.get_running_loop().time())


class Running:
    """The requests of a server, and whether it takes new ones. Of one event loop."""

    def __init__(self) -> None:
        self.is_draining = False
        self._lives: set[_Life] = set()

    def __len__(self) -> int:
        return len(self._lives)

    def add(self, life: _Life) -> None:
        """Counts a request that begins."""
        self._lives.add(life)

    def remove(self, life: _Life) -> None:
        """Counts a request that has ended."""
        self._lives.discard(life)

    async def drain(self, seconds: float) -> int:
        """Takes no new requests and waits for the running ones; cancels those that take longer.

        Returns:
          How many were cancelled.
        """
        self.is_draining = True
        await self._wait(seconds)
        late = list(self._lives)
        for life in late:
            life.end(APIError(503, "the server is shutting down", kind="server_error", code="shutting_down"))
        await self._wait(_LAST_WORDS_SECONDS)
        return len(late)

    async def _wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._lives and loop.time() < end:
            await asyncio.sleep(0.02)


class Lifetime:
    """ASGI middleware: 503 while draining, 408, 413 and 504; cancels a request when its client goes away.

    A request that is cancelled after its response has begun gets an error event at the end if it is an event stream.
    """

    def __init__(self, app: ASGIApp, *, running: Running, timeout_seconds: float, max_body_bytes: int) -> None:
        self._app, self._running = app, running
        self._seconds, self._max_body_bytes = timeout_seconds, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS_OPEN:
            await self._app(scope, receive, send)
            return
        if self._running.is_draining:
            error = APIError(
                503,
                "the server is shutting down; send the request to another one",
                kind="server_error",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )
            await ErrorResponse(error)(scope, receive, send)
            return
        response = _Response(send)
        late = APIError(408, f"the body did not arrive within {self._seconds:g} s (timeout_seconds)", code="timeout")
        deadline = asyncio.timeout(self._seconds)
        life = _Life(deadline, late)
        self._running.add(life)
        try:
            async with deadline:
                try:
                    await self._run(scope, receive, response, life)
                finally:
                    life.is_over = True
        except TimeoutError:
            if not deadline.expired():
                raise
            if life.reason is not None:
                await response.fail(life.reason, scope, receive)
        except APIError as error:
            await response.fail(error, scope, receive)
        except ClientGoneError:
            pass
        finally:
            self._running.remove(life)

    async def _run(self, scope: Scope, receive: Receive, response: _Response, life: _Life) -> None:
        """Reads the body and runs the app; ends the request when its client goes away too early."""
        body = await read_body(scope, receive, self._max_body_bytes)
        life.reason = APIError(
            504,
            f"the request took longer than {self._seconds:g} s (timeout_seconds)",
            kind="server_error",
            code="timeout",
        )
        gone = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not response.is_complete:
                life.end(None)

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, replay, response.send)
        finally:
            watcher.cancel()


class _Response:
    """What has been sent of a response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = self._is_event_stream = self.is_complete = False

    async def send(self, message: Message) -> None:
        """Sends a part."""
        if message["type"] == "http.response.start":
            self._has_begun = True
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._is_event_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    async def fail(self, error: APIError, scope: Scope, receive: Receive) -> None:
        """Ends the response with an error: as a response, or as an event if a stream of events has begun."""
        if not self._has_begun:
            await ErrorResponse(error)(scope, receive, self.send)
        elif not self.is_complete and self._is_event_stream:
            event = b"data: " + json.dumps(error.body).encode() + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
