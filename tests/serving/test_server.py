"""The server at a signal: it drains, says so, and returns."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from rwkv_jax.inference.engine.driver import EngineStats
from rwkv_jax.serving.access_log import LOGGER
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.server import DrainingServer, open_access_log, run_server
from rwkv_jax.serving.service import Service


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class IdleEngine:
    """An engine that has nothing to do, and warms up when it is told to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.may_be_warm, self.failure = threading.Event(), failure
        self.adapters = SimpleNamespace(names=())

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * len(EngineStats._fields))

    def warm_up(self) -> None:
        assert self.may_be_warm.wait(10)
        if self.failure is not None:
            raise self.failure


class Connection:
    """One request to a server, read piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def get(cls, port: int, path: str) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        return cls(reader, writer)

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), 10)

    async def rest(self) -> bytes:
        rest = await asyncio.wait_for(self.reader.read(), 10)
        self.writer.close()
        return rest


def app_with_streams(service: Service, seconds: float) -> FastAPI:
    """Streams of events, one at once and one after some seconds."""
    app = create_app(service)

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        await asyncio.sleep(seconds)
        yield "data: 2\n\n"

    @app.get("/events")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.mark.parametrize(("seconds", "is_in_time"), [(0.3, True), (30.0, False)])
def test_a_signal_lets_running_requests_end_and_refuses_others(seconds: float, is_in_time: bool) -> None:
    async def main() -> None:
        service = Service(cast(Any, IdleEngine()), "x", ServeOptions(drain_seconds=2.0 if is_in_time else 0.3))
        port = free_port()
        config = uvicorn.Config(app_with_streams(service, seconds), port=port, log_level="error", access_log=False)
        server = DrainingServer(config, service)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        running = await Connection.get(port, "/events")
        await running.until(b"data: 1\n\n")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        for path, status in (("/health", b"503"), ("/events", b"503"), ("/metrics", b"200")):
            other = await Connection.get(port, path)
            assert (await other.until(b"\r\n")).split()[1] == status
            await other.rest()
        rest = await running.rest()
        if is_in_time:
            assert b"data: 2\n\n" in rest
        else:
            event = rest.split(b"data: ")[1].split(b"\n\n")[0]
            assert json.loads(event)["error"]["code"] == "shutting_down"
        assert rest.endswith(b"0\r\n\r\n")  # a whole response
        await asyncio.wait_for(serving, 10)  # without the signal's own end of the process

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_a_server_is_ready_once_its_programs_are_compiled(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    statuses = []
    engine = IdleEngine(ArithmeticError("a program") if fails else None)
    service = Service(cast(Any, engine), "x", ServeOptions(port=free_port()))

    async def watch(server: uvicorn.Server) -> None:
        """Asks until the server is ready, and ends it then."""
        while not server.started:
            await asyncio.sleep(0.01)
        while not server.should_exit:
            connection = await Connection.get(service.options.port, "/health")
            statuses.append(int((await connection.until(b"\r\n")).split()[1]))
            await connection.rest()
            engine.may_be_warm.set()
            if statuses[-1] == 200:
                os.kill(os.getpid(), signal.SIGINT)
                break
            await asyncio.sleep(0.01)

    async def serve(server: uvicorn.Server) -> None:
        await asyncio.gather(server.serve(), watch(server))

    monkeypatch.setattr(DrainingServer, "run", lambda server: asyncio.run(serve(server)))
    monkeypatch.setattr(LOGGER, "propagate", LOGGER.propagate)
    if fails:
        with pytest.raises(ArithmeticError, match="a program"):
            run_server(service)
        assert set(statuses) == {503}
    else:
        run_server(service)
        assert statuses[0] == 503
        assert statuses[-1] == 200


def test_the_access_log_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "propagate", True)
    with open_access_log(ServeOptions(access_log=tmp_path / "log")):
        LOGGER.info("{}")
    assert (tmp_path / "log").read_text() == "{}\n"
    assert LOGGER.handlers == []
