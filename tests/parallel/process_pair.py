"""Starts two processes of process_together.py and waits for their end."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.golden import QUICK_FLAGS

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def start(scenario: str, port: int, index: int) -> subprocess.Popen[str]:
    """A process of process_together.py, with two fake devices."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*QUICK_FLAGS, "--xla_force_host_platform_device_count=2"]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "tests.parallel.process_coordination", scenario, str(port), str(index)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    output: str
    errors: str
    seconds: float
    """From when the first of its pair was killed, or from the start."""


def end_of(scenario: str, killed: int | None = None) -> list[Ended]:
    """How two processes end; `killed` is killed once both have joined."""
    port = free_port()
    pair = [start(scenario, port, index) for index in range(2)]
    try:
        begin = time.monotonic()
        if killed is not None:
            for process in pair:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("process ")
            begin = time.monotonic()
            pair[killed].kill()
        texts = [process.communicate(timeout=90) for process in pair]
    finally:
        for process in pair:
            process.kill()
    seconds = time.monotonic() - begin
    return [Ended(process.returncode, *text, seconds) for process, text in zip(pair, texts, strict=True)]
