"""Rows of a benchmark as processes, each in an interpreter of its own, that wait without using a core in between.

Needs the standard library only, so that it can be imported in every peer's own environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

HERE = Path(__file__).resolve().parent

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class PeerError(RuntimeError):
    """A peer has ended; the message has its last words."""


def last_words(log: str) -> str:
    """Why a program ended: the line of its last exception, below which JAX writes notes, or else its last line."""
    lines = [line for line in log.splitlines() if re.search(r"\w", line)]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (exceptions or lines or ["nothing"])[-1].strip()


class PeerProcess:
    """A program that calls `serve` and has been given a job; requests and answers are JSON lines."""

    def __init__(
        self, python: str, program: str, job: Mapping[str, Any], log: Path, environment: dict[str, str]
    ) -> None:
        """Starts it; the first answer comes when the job is open.

        Args:
          python: the interpreter of an environment that has what the program needs.
          program: file name in this folder.
          log: what it prints goes there.
          environment: variables beside those that every peer has.
        """
        search_path = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
        on_cpu = {
            "PYTHONPATH": os.pathsep.join(path for path in search_path if path),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._log = log.open("w+b")
        self._process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | on_cpu | environment,
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
        raise PeerError(f"ended with status {status}, saying: {last_words(self._log.read().decode(errors='replace'))}")

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request; raises PeerError when it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
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


def serve(open_job: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """The other end of a PeerProcess: open the job of the command line, then answer until standard input closes.

    Args:
      open_job: gives the first answer, and what answers requests; to each answer is added `peak_bytes`, the most
        resident memory that the process has had.
    """
    # Libraries print what they like; only answers may reach the driver.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ready, answer = open_job(json.loads(sys.argv[1]))
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        found = answer(json.loads(line))
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found | {"peak_bytes": peak_bytes}), file=answers)


def progress(text: str) -> None:
    """Tell who waits what goes on; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)
