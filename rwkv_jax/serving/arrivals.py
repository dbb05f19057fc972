"""Tells the engine of requests that are being parsed, so that those that come together start together."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv_jax.inference.engine.driver import Announcement

_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
_OWN: contextvars.ContextVar[Announcement | None] = contextvars.ContextVar("announcement", default=None)


class Arrivals:
    """ASGI middleware: announces the texts of each request whose body is there."""

    def __init__(self, app: ASGIApp, *, announce: Callable[[], Announcement]) -> None:
        """In front of an app.

        Args:
          announce: the engine's.
        """
        self._app, self._announce = app, announce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        own = self._announce()
        _OWN.set(own)
        try:
            await self._app(scope, receive, send)
        finally:
            own.end()


def has_arrived() -> None:
    """Says that the engine has this request's texts."""
    if (own := _OWN.get()) is not None:
        own.end()
