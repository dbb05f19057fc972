"""benchmarks/serve_client.py: what it makes of answers, whole, streamed in odd pieces, wrong and cut off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from serve_client import Reply, complete


def event(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\r\n\r\n'
DONE = b"data: [DONE]\n\n"
PING = b": ping\r\n\r\n"
TEXTS = event(text="") + event(text="a") + PING + event(text="b", finish_reason="length")


def reply_to(kind: str, parts: Sequence[bytes], *, leave_after: int | None = None, ends: bool = True) -> Reply:
    """The client's reply to an answer in chunks; status 400 where it is JSON."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"x"}')
        status = 200 if kind == "text/event-stream" else 400
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for part in parts:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        if ends:
            writer.write(b"0\r\n\r\n")
        writer.close()

    async def main() -> Reply:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await complete(server.sockets[0].getsockname()[1], {"prompt": "x"}, leave_after)

    return asyncio.run(main())


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream(size: int) -> None:
    data = TEXTS + USAGE + DONE
    reply = reply_to("text/event-stream", [data[i : i + size] for i in range(0, len(data), size)])
    assert (reply.status, reply.num_texts, reply.num_tokens, reply.error) == (200, 2, 7, "")
    assert 0 < reply.first_seconds <= reply.seconds


def test_a_client_leaves() -> None:
    reply = reply_to("text/event-stream", [TEXTS, DONE], leave_after=1)
    assert (reply.is_left, reply.num_texts, reply.error) == (True, 1, "")


@pytest.mark.parametrize(
    ("kind", "parts", "ends", "error"),
    [
        ("text/event-stream", [TEXTS], True, "without [DONE]"),
        ("text/event-stream", [TEXTS], False, "IncompleteReadError"),
        ("text/event-stream", [TEXTS, b'data: {"error": {"code": "timeout"}}\n\n'], True, "timeout"),
        ("application/json", [b'{"error": {"code": "queue_full"}}'], True, "queue_full"),
    ],
)
def test_what_goes_wrong_is_an_error(kind: str, parts: list[bytes], ends: bool, error: str) -> None:
    assert error in reply_to(kind, parts, ends=ends).error


def test_nobody_listens() -> None:
    assert "ConnectionRefusedError" in asyncio.run(complete(1, {})).error
