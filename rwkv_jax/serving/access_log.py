"""One line for each request: a JSON object with who, what and how long; never a prompt, never a reply."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_jax.serving.errors import ErrorResponse, as_api_error
from rwkv_jax.serving.metrics import Metrics
from rwkv_jax.serving.token_counts import begin_counting

LOGGER = logging.getLogger("rwkv_jax.serving.access")
"""Each record's message is a line of JSON."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CLIENT_GONE = 499  # as nginx logs it


class AccessLog:
    """ASGI middleware, the outermost: request ids, the access log, metrics of requests, 500 for the unexpected.

    A client's header X-Request-Id is kept if it is at most 128 letters, digits, dots, - and _; the response has the id.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        tokens = begin_counting()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            answer = as_api_error(error)  # which logs what nobody expected
            if not status:
                await ErrorResponse(answer)(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            self._record(scope, status or _CLIENT_GONE, time.perf_counter() - begin, tokens)

    def _record(self, scope: Scope, status: int, seconds: float, tokens: dict[str, int]) -> None:
        route = route_of(scope)
        self._metrics.requests.labels(route, scope["method"], str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if LOGGER.isEnabledFor(logging.INFO):
            state: dict[str, Any] = scope["state"]
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": state["request_id"],
                "tenant": state.get("tenant", ""),
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
                **tokens,
            }
            LOGGER.info(json.dumps(line))


def route_of(scope: Scope) -> str:
    """The route that answered, with its parameters' names in place of values; "none" if there was none."""
    route = scope.get("route")
    return "none" if route is None else route.path
