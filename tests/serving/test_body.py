"""Bodies: their size, before they are held, and their nesting, before they are parsed."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest

from rwkv_jax.serving.body import MAX_JSON_DEPTH, ClientGoneError, is_deeper, read_body
from rwkv_jax.serving.errors import APIError


def read(parts: list[bytes], max_bytes: int, headers: dict[bytes, bytes] | None = None) -> tuple[bytes, int]:
    """The body, or the error's status, and how many parts were asked for."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    asked = 0

    async def receive() -> dict[str, object]:
        nonlocal asked
        asked += 1
        return messages[asked - 1]

    try:
        return asyncio.run(read_body({"headers": list((headers or {}).items())}, receive, max_bytes)), asked
    except APIError as error:
        return str(error.status).encode(), asked


def test_a_body_is_read_up_to_its_limit_and_no_further() -> None:
    assert read([b"ab", b"", b"cd"], 4) == (b"abcd", 3)
    assert read([b"ab", b"cde", b"f"], 4) == (b"413", 2)
    assert read([b"a"], 4, {b"content-length": b"5"}) == (b"413", 0)
    assert read([b"a"], 4, {b"content-length": b"9" * 5000}) == (b"413", 0)
    assert read([b"a"], 4, {b"content-length": b"-1"}) == (b"a", 1)


def test_a_client_may_leave() -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        asyncio.run(read_body({"headers": []}, receive, 10))


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def random_value(draws: random.Random, depth: int) -> object:
    kind = draws.randrange(4 if depth else 2)
    if kind == 2:
        return [random_value(draws, depth - 1) for _ in range(draws.randrange(3))]
    if kind == 3:
        return {draws.choice(['"', "\\", "[", "a{"]): random_value(draws, depth - 1) for _ in range(draws.randrange(3))}
    return draws.choice(['[{"', '\\"[', "]}", "\\\\", "", 1.5, None])


def test_depth_is_that_of_the_parsed_value() -> None:
    draws = random.Random(0)
    for _ in range(300):
        value = random_value(draws, 6)
        body, depth = json.dumps(value).encode(), depth_of(value)
        assert not is_deeper(body, depth)
        assert depth == 0 or is_deeper(body, depth - 1)


def test_deep_bodies_are_refused_before_they_are_parsed() -> None:
    deep = b"[" * 100_000
    assert read([deep], 10**6) == (b"400", 1)
    assert read([b'{"a":' * (MAX_JSON_DEPTH + 1)], 10**6) == (b"400", 1)
    assert read([b"[" * MAX_JSON_DEPTH], 10**6)[0] == b"[" * MAX_JSON_DEPTH
    assert read([deep], 10**6, {b"content-type": b"application/octet-stream"})[0] == deep  # a state, which is not JSON


@pytest.mark.parametrize("piece", [b'"\\', b'\\"', b'"', b"[]", b"[", b'"[', b"\\", b'"\\"['])
def test_the_scan_takes_linear_time(piece: bytes) -> None:
    body = b"[" * MAX_JSON_DEPTH + b'"' + piece * 200_000
    begin = time.process_time()
    is_deeper(body, MAX_JSON_DEPTH)
    assert time.process_time() - begin < 2  # quadratic time would be hours
