"""Runs the application until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn
from typing_extensions import override

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.driver import EngineClosedError
from rwkv_jax.serving.access import LocalHosts
from rwkv_jax.serving.access_log import LOGGER
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service

_KEEP_ALIVE_SECONDS = 75  # longer than clients keep connections: who closes one first must not be the server
_LOG = logging.getLogger("uvicorn.error")


def run_server(service: Service) -> None:
    """Serves a model on the address of its options; returns after SIGINT or SIGTERM, once the server has drained.

    Connections are taken at once, while the engine's programs are compiled; /health says when that is done.
    """
    options = service.options
    service.is_warm = False
    app = create_app(service)
    if options.is_loopback and options.api_keys is None:
        app.add_middleware(LocalHosts)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    with open_access_log(options):
        server = DrainingServer(config, service)
        server.run()
    if server.failure is not None:
        raise server.failure


class DrainingServer(uvicorn.Server):
    """At the first signal it answers 503 to new requests and lets the running ones end; at the second it exits."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.failure: Exception | None = None
        """Why the server ended by itself."""

    @override
    async def startup(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self._service.is_warm:
            self._tasks.append(asyncio.create_task(self._warm_up()))

    async def _warm_up(self) -> None:
        try:
            await asyncio.to_thread(self._service.engine.warm_up)
        except EngineClosedError:
            return
        except Exception as failure:
            self.failure, self.should_exit = failure, True
        else:
            self._service.is_warm = True
            _LOG.info("All programs are compiled")

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._service.running.is_draining:
            super().handle_exit(sig, frame)
            return
        self._service.running.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        self._tasks.append(asyncio.create_task(self._drained(sig)))

    async def _drained(self, sig: int) -> None:
        running, seconds = self._service.running, self._service.options.drain_seconds
        _LOG.info("%s: %d requests may end within %g s", signal.Signals(sig).name, len(running), seconds)
        if num_cancelled := await running.drain(seconds):
            _LOG.warning("%d requests took longer and were cancelled", num_cancelled)
        self.should_exit = True


@contextlib.contextmanager
def open_access_log(options: ServeOptions) -> Iterator[None]:
    """Within it lines go to standard output, or to a file that may be moved away at any time.

    Raises:
      ConfigError: the file cannot be written.
    """
    if options.access_log is None:
        handler: logging.Handler = logging.StreamHandler(sys.stdout)
    else:
        try:
            handler = logging.handlers.WatchedFileHandler(options.access_log, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"access_log = {str(options.access_log)!r}: cannot be written ({error})") from error
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
