"""Clients of a completions server on this machine: streams over HTTP/1.1, timed, and left in the midst on demand.

Needs the standard library only, so that the same client measures any server. As a program it is the other end of a
PeerProcess: it answers a request {"port", "bodies", "delays"} with the replies, one client a body, after its delay.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import peers_processes

_LIMIT = 2**22  # bytes of a line
_TIMEOUT = 600.0


@dataclasses.dataclass
class Reply:
    """What one request came to."""

    status: int = 0
    first_seconds: float = 0.0
    """To the first event with text."""
    seconds: float = 0.0
    """To the end."""
    num_texts: int = 0
    """Events with text."""
    num_tokens: int = 0
    """Generated, where the server reports usage."""
    num_prompt_tokens: int = 0
    """Likewise."""
    text: str = ""
    """Of an answer that is no stream."""
    is_left: bool = False
    """Whether the client went away in the midst of it."""
    error: str = ""
    """What the server or the connection said was wrong."""


async def complete(
    port: int, body: Mapping[str, Any], leave_after: int | None = None, *, key: str | None = None
) -> Reply:
    """Asks for a completion and reads it to its end.

    Args:
      leave_after: events with text after which the client goes away without a word.
      key: an API key.
    """
    reply, begin = Reply(), time.perf_counter()
    try:
        async with asyncio.timeout(_TIMEOUT):
            await _complete(_request(port, body, key), port, leave_after, reply, begin)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        reply.error = reply.error or f"{type(error).__name__}: {error}"
    reply.seconds = time.perf_counter() - begin
    return reply


def _request(port: int, body: Mapping[str, Any], key: str | None) -> bytes:
    content = json.dumps(body).encode()
    fields = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": str(len(content))}
    fields |= {"Connection": "close"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content


async def _complete(request: bytes, port: int, leave_after: int | None, reply: Reply, begin: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LIMIT)
    try:
        writer.write(request)
        header = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        reply.status = int(header.split(" ", 2)[1])
        parts = _chunks(reader) if "transfer-encoding: chunked" in header else _rest(reader)
        if "content-type: text/event-stream" not in header:
            answer = json.loads(b"".join([part async for part in parts]))
            reply.error = json.dumps(answer["error"]) if "error" in answer else ""
            usage = answer.get("usage") or {}
            reply.num_tokens = usage.get("completion_tokens", 0)
            reply.num_prompt_tokens = usage.get("prompt_tokens", 0)
            reply.text = "".join(choice.get("text") or "" for choice in answer.get("choices", ()))
            return
        await _read_events(parts, leave_after, reply, begin)
    finally:
        writer.transport.abort()  # after a whole answer there is nothing left to lose


async def _read_events(parts: AsyncIterator[bytes], leave_after: int | None, reply: Reply, begin: float) -> None:
    is_done = False
    async for event in _events(parts):
        if event == b"[DONE]":
            is_done = True
            continue
        answer = json.loads(event)
        if "error" in answer:
            reply.error = json.dumps(answer["error"])
            return
        if any(choice.get("text") for choice in answer["choices"]):
            reply.num_texts += 1
            reply.first_seconds = reply.first_seconds or time.perf_counter() - begin
        if answer.get("usage"):
            reply.num_tokens = answer["usage"]["completion_tokens"]
        if leave_after is not None and reply.num_texts >= leave_after:
            reply.is_left = True
            return
    if not is_done:
        reply.error = "the stream ended without [DONE]"


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Data of each event."""
    rest = b""
    async for part in parts:
        rest = (rest + part).replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(2**16):
        yield part


async def at_once(port: int, bodies: Sequence[Mapping[str, Any]], delays: Sequence[float] | None = None) -> list[Reply]:
    """One client for each body, all at once but for delays in seconds."""

    async def client(body: Mapping[str, Any], delay: float) -> Reply:
        await asyncio.sleep(delay)
        return await complete(port, body)

    return list(await asyncio.gather(*map(client, bodies, delays or [0.0] * len(bodies))))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of a page; status 0 while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_until_ready(port: int, path: str = "/health", seconds: float = 900.0) -> None:
    """Waits for a server to come up and be warm. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while get(port, path)[0] != 200:
        if time.monotonic() > end:
            raise TimeoutError(f"port {port}: no server within {seconds:.0f} s")
        time.sleep(0.1)


def metrics(port: int) -> dict[str, float]:
    """Values without labels of /metrics."""
    lines = [line.split(" ") for line in get(port, "/metrics")[1].splitlines() if line.startswith("rwkv_")]
    return {name: float(value) for name, value in lines if "{" not in name}


def _open(job: dict[str, Any]) -> tuple[dict[str, Any], peers_processes.Answer]:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        replies = asyncio.run(at_once(request["port"], request["bodies"], request.get("delays")))
        return {"replies": [dataclasses.asdict(reply) for reply in replies], "seconds": time.perf_counter() - begin}

    return {}, answer


if __name__ == "__main__":
    peers_processes.serve(_open)
