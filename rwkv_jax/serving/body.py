"""Reads the bodies of requests within limits, before anything parses them."""

from __future__ import annotations

import re

from starlette.types import Receive, Scope

from rwkv_jax.serving.errors import APIError

MAX_JSON_DEPTH = 64
"""Objects and arrays within each other; parsers recurse once a level."""

# A string, also one that never ends, is passed over as one match, so that the scan is linear.
_STRINGS_AND_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class ClientGoneError(Exception):
    """The client has closed the connection before its body was read."""


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body of a request.

    Raises:
      APIError: 413 as soon as there are more than `max_bytes`, or as many are announced; 400 if JSON is nested deeper
        than `MAX_JSON_DEPTH`.
      ClientGoneError: the connection was closed.
    """
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size, is_more = 0, True
    while is_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size, is_more = size + len(part), message.get("more_body", False)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    body = b"".join(parts)
    is_binary = headers.get(b"content-type", b"").startswith(b"application/octet-stream")
    if not is_binary and is_deeper(body, MAX_JSON_DEPTH):
        raise APIError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    return body


def is_deeper(body: bytes, depth: int) -> bool:
    """Whether JSON has more than `depth` objects and arrays within each other. Linear in time, without recursion."""
    if body.count(b"[") + body.count(b"{") <= depth:
        return False
    level = 0
    for match in _STRINGS_AND_BRACKETS.finditer(body):
        if (first := match[0][:1]) in b"[{":
            level += 1
            if level > depth:
                return True
        elif first in b"]}":
            level = max(0, level - 1)
    return False


def _too_large(max_bytes: int) -> APIError:
    return APIError(413, f"the body is larger than {max_bytes} bytes (max_body_bytes)", code="request_too_large")
