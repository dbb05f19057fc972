"""A redis-server of Debian's package, on a free port, that tests may kill and start again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self


class RedisServer:
    """Runs while its `with` block does, in a folder of its own. By default it saves nothing unless told to."""

    def __init__(self, folder: Path, *options: str, password: str | None = None) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise RuntimeError("redis-server: is not installed; apt-get install redis-server")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        own = f"--port {self._port} --bind 127.0.0.1 --dir {folder} --daemonize no".split()
        self._command = [program, *own, "--save", "", *options]
        self.url = f"redis://:{password}@127.0.0.1:{self._port}" if password else f"redis://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if not connection.recv(64).startswith(b"-LOADING"):
                        return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError("redis-server: does not answer")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
