"""Speaks ASGI to an app without a network, message by message, so that clients can be as rude as they like."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message


@dataclasses.dataclass
class Answer:
    """What an app has sent."""

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    @property
    def error(self) -> dict[str, Any]:
        """The error of a response in OpenAI's form."""
        return json.loads(self.body)["error"]


class Client:
    """One request."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        parts: Sequence[bytes] | None = (b"",),
        headers: dict[str, str] | None = None,
    ) -> None:
        """Args: parts: of the body; None sends no end of it."""
        self.answer = Answer()
        named = {"Host": "127.0.0.1:8000"} | (headers or {})
        raw = [(name.lower().encode(), value.encode()) for name, value in named.items()]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._app = app
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for index, part in enumerate(parts or ()):
            is_last = index == len(parts or ()) - 1
            self._messages.put_nowait({"type": "http.request", "body": part, "more_body": not is_last})

    def disconnect(self) -> None:
        """The client goes away."""
        self._messages.put_nowait({"type": "http.disconnect"})

    async def run(self) -> Answer:
        """The whole answer."""
        await self._app(self._scope, self._messages.get, self._send)
        return self.answer

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.answer.body += message.get("body", b"")
            self.answer.is_complete = not message.get("more_body", False)


async def ask(app: ASGIApp, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """The answer to one request."""
    return await Client(app, method, path, parts=(body,), headers=headers).run()
