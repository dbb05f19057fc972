"""A server that is killed: every turn that was answered is there after its restart, and none is half written."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NUM_KILLS = 20
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def server(store: Path, cache: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that answers; killed at the end if the block has not done so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }
    command = [sys.executable, "-m", "tests.serving.state_server", str(store), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield process, port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def request(port: int, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            yield answer


def read_turn(answer: http.client.HTTPResponse) -> tuple[str, int]:
    """Text of a stream and number of tokens after it. Raises ConnectionError if it does not end."""
    text = ""
    while True:
        try:
            line = answer.readline()
        except ValueError as error:  # the size of a chunk that has not come
            raise ConnectionError("the stream has no end") from error
        if not line.endswith(b"\n"):
            raise ConnectionError("the stream has no end")
        if line.startswith(b"data: {"):
            chunk = json.loads(line.removeprefix(b"data: "))
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["delta"].get("content", "")
            if "state" in chunk:
                return text, chunk["state"]["num_tokens"]


@dataclasses.dataclass
class Conversation:
    """A client that takes one turn after another until its server is gone."""

    name: str
    answered: list[str] = dataclasses.field(default_factory=list)
    """Texts of the turns whose end has arrived; "?" of one that was kept and has not arrived."""
    num_tokens: int = 0
    """After these."""

    def turn(self, port: int, session: str, index: int) -> tuple[str, int]:
        """Text and number of tokens after it. Raises OSError or ConnectionError where the server is gone."""
        message = {"role": "user", "content": f"Turn {index} of {self.name}"}
        body = {"model": "tiny", "temperature": 0, "max_tokens": 8 + index % 7, "stream": True, "session": session}
        with request(port, "POST", "/v1/chat/completions", body | {"messages": [message]}) as answer:
            assert answer.status == 200, answer.read()
            return read_turn(answer)

    def go_on(self, port: int) -> None:
        self.resume(port)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                text, self.num_tokens = self.turn(port, self.name, len(self.answered))
                self.answered.append(text)

    def resume(self, port: int) -> None:
        """Compares what the server has with what was answered."""
        with request(port, "GET", "/v1/states") as answer:
            kept = json.loads(answer.read())["data"]
        found = {info["id"]: info["num_tokens"] for info in kept}.get(self.name, 0)
        assert found >= self.num_tokens
        if found > self.num_tokens:  # the last turn was kept, and the server killed before its end was sent
            self.answered.append("?")
            self.num_tokens = found
        if found:  # whole: the server checks what it reads
            with request(port, "GET", f"/v1/states/{self.name}") as answer:
                assert answer.status == 200


@pytest.mark.long
def test_turns_that_were_answered_survive_kills(tmp_path: Path) -> None:
    draws = random.Random(17)
    conversations = [Conversation(f"talk-{i}") for i in range(3)]
    for _ in range(NUM_KILLS):
        with server(tmp_path / "states.sqlite", tmp_path / "programs") as (process, port):
            before = sum(len(each.answered) for each in conversations)
            threads = [threading.Thread(target=each.go_on, args=(port,)) for each in conversations]
            for thread in threads:
                thread.start()
            while sum(len(each.answered) for each in conversations) < before + 4 and process.poll() is None:
                time.sleep(0.005)
            time.sleep(draws.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert sum(len(each.answered) for each in conversations) >= before + 4
    # The same conversations without a kill.
    with server(tmp_path / "states.sqlite", tmp_path / "programs") as (_, port):
        for conversation in conversations:
            conversation.resume(port)
            num_tokens = 0
            for index, answered in enumerate(conversation.answered):
                text, num_tokens = conversation.turn(port, f"{conversation.name}-anew", index)
                assert answered in (text, "?")
            assert num_tokens == conversation.num_tokens
