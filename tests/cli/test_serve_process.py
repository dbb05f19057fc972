"""`rwkv serve` as a process: not ready, ready, keys, a signal in the midst of a stream, exit status 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_client import complete, free_port, get, wait_until_ready

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-alice-0123456789"
PROMPT = "def what_nobody_else_may_read("


@contextlib.contextmanager
def serving(run_dir: Path, *flags: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server as a process, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "rwkv_jax", "serve", str(run_dir), "--port", str(port), *map(str, flags)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [*command, "--tune", "never"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_stream_ends_before_the_server_does(run_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"  # nobody reads the process's standard output until it has ended
    with serving(run_dir, "--drain-seconds", 60, "--access-log", log) as (process, port):
        while (status := get(port, "/health"))[0] == 0:
            assert process.poll() is None
            time.sleep(0.05)
        assert status[0] in (200, 503)  # it listens while it compiles
        wait_until_ready(port)
        body = {"model": "run", "prompt": PROMPT, "max_tokens": 5000, "stream": True, "ignore_eos": True}

        async def main() -> tuple[int, int]:
            running = asyncio.create_task(complete(port, body))
            while "rwkv_running_texts 1.0" not in (await asyncio.to_thread(get, port, "/metrics"))[1]:
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            refused = await complete(port, body)
            reply = await running
            assert reply.error == ""
            return reply.status, refused.status

        assert asyncio.run(main())[0] == 200
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (done,) = (line for line in lines if line["route"] == "/v1/completions" and line["status"] == 200)
    assert done["completion_tokens"] == 5000
    assert PROMPT not in log.read_text() + out + err
    assert "Traceback" not in err


@pytest.mark.long
def test_what_takes_longer_than_the_drain_is_cancelled(run_dir: Path, tmp_path: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"alice:{KEY}\n")
    with serving(run_dir, "--drain-seconds", 0.5, "--api-keys", keys, "--access-log", log) as (process, port):
        wait_until_ready(port)
        body = {"model": "run", "prompt": PROMPT, "max_tokens": 10**6, "stream": True, "ignore_eos": True}

        async def main() -> None:
            assert (await complete(port, body)).status == 401
            running = asyncio.create_task(complete(port, body, key=KEY))
            await asyncio.sleep(1)
            process.send_signal(signal.SIGTERM)
            reply = await running
            assert (reply.status, json.loads(reply.error)["code"]) == (200, "shutting_down")

        asyncio.run(main())
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "may be read by other users" in err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["tenant"] for line in lines if line["route"] == "/v1/completions"] == ["alice"]
    assert KEY not in log.read_text() + err
