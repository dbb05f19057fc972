"""Who may send requests, and how many: API keys, tenants, limits for each of them. Pure ASGI: streams stay streams."""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
import math
import time
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv_jax.serving.errors import APIError, ErrorResponse
from rwkv_jax.serving.keys import ApiKeys

OPEN_PATHS = frozenset({"/", "/health"})
"""Need no key: the chat page, which then asks for one, and what a load balancer looks at."""

_UNLIMITED_PATHS = frozenset({"/", "/health", "/metrics"})


class TokenBucket:
    """Allows `per_minute` requests a minute, and as many at once after a minute without any."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._capacity, self._clock = per_minute / 60, max(1.0, per_minute), clock
        self._tokens, self._updated = self._capacity, clock()

    def take(self) -> float:
        """Takes a request's token: 0.0, or the seconds until there will be one."""
        now = self._clock()
        self._tokens = min(self._capacity, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate


@dataclasses.dataclass(frozen=True)
class TenantLimits:
    """Limits of each tenant; None is no limit."""

    requests_per_minute: float | None = None
    max_concurrent: int | None = None


class Access:
    """ASGI middleware: sets `request.state.tenant`, "" without keys; 401, 403 and 429 come from here."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None = None,
        limits: TenantLimits | None = None,
        cors_origins: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Guards an app.

        Args:
          keys: None lets everyone in.
          cors_origins: of pages that may use the server from a browser; "*" is all.
        """
        self._app, self._keys, self._limits = app, keys, limits or TenantLimits()
        self._origins, self._clock = frozenset(cors_origins), clock
        self._buckets: dict[str, TokenBucket] = {}  # by tenant, of which there are as many as keys at most
        self._running: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._enter(scope)
        except APIError as error:
            await ErrorResponse(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["path"] not in _UNLIMITED_PATHS:
                self._running[tenant] -= 1

    def _enter(self, scope: Scope) -> str:
        """The request's tenant; counts the request as running."""
        headers = Headers(scope=scope)
        self._check_origin(headers)
        tenant = "" if self._keys is None else self._authenticated(self._keys, headers, scope["path"])
        if scope["path"] in _UNLIMITED_PATHS:
            return tenant
        most, rate = self._limits.max_concurrent, self._limits.requests_per_minute
        if most is not None and self._running[tenant] >= most:
            raise _too_many(f"{most} requests of this key are running already (max_concurrent)", 1)
        if rate is not None:
            bucket = self._buckets.get(tenant) or self._buckets.setdefault(tenant, TokenBucket(rate, self._clock))
            if seconds := bucket.take():
                raise _too_many(f"more than {rate:g} requests a minute (requests_per_minute)", math.ceil(seconds))
        self._running[tenant] += 1
        return tenant

    def _check_origin(self, headers: Headers) -> None:
        """Refuses requests that a page of another origin makes in a browser: no page may use a server behind its user.

        Browsers send some requests without asking first (CORS), and would only hide the answer.
        """
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise APIError(
                403, "pages of this origin may not use the server; start it with --cors-origins ORIGIN to allow it"
            )

    def _authenticated(self, keys: ApiKeys, headers: Headers, path: str) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and (tenant := keys.tenant(key.strip())) is not None:
            return tenant
        if path in OPEN_PATHS:
            return ""
        raise APIError(
            401,
            "a valid API key is needed, as the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class LocalHosts:
    """ASGI middleware for a server without keys on a loopback address: it goes by that address's names only.

    Otherwise a page could reach it under the page's own name, which its owner lets point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not _is_local(host):
                message = "a server without API keys on a loopback address goes by localhost, 127.0.0.1 and [::1] only"
                await ErrorResponse(APIError(421, message))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _too_many(message: str, seconds: int) -> APIError:
    return APIError(
        429,
        f"{message}; try again in {seconds} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )
