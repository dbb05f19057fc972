"""Processes that measure a peer each, in an interpreter of its own, and wait without using a core in between."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any, cast

from peers_protocol import Job, Request

HERE = Path(__file__).resolve().parent


class PeerError(RuntimeError):
    """A peer has ended; the message has its last words."""


class PeerProcess:
    """A program of benchmarks/peers_*.py that has been given a job."""

    def __init__(self, python: str, program: str, job: Job, log: Path) -> None:
        """Starts it; the first answer comes when the model is open.

        Args:
          python: the interpreter of an environment that has what the program needs.
          program: file name in this folder.
          log: what it prints goes there.
        """
        search_path = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in search_path if path),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(job.threads),
        }
        self._log = log.open("w+b")
        self._process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def answer(self) -> dict[str, Any]:
        """Wait for what it says next; raises PeerError when it has ended instead."""
        if line := self._answers.readline():
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
        raise PeerError(f"ended with status {status}, saying: {words[-1]}")

    def ask(self, request: Request) -> dict[str, Any]:
        """The answer to a request; raises PeerError when it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(dataclasses.asdict(request)) + "\n")
            self._requests.flush()
        return self.answer()

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.terminate()
        self._process.wait()
        self._answers.close()
        self._log.close()
