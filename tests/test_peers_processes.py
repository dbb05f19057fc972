"""benchmarks/peers_processes.py: what a driver and the processes of its rows say to each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import peers_processes
from peers_processes import PeerError, PeerProcess

BENCHMARKS = {"PYTHONPATH": str(Path(peers_processes.__file__).parent)}

ADDER = """
from peers_processes import serve

def open_job(job):
    print("what a library says", flush=True)
    return {"ready": job["start"]}, lambda request: {"sum": job["start"] + request["number"]}

serve(open_job)
"""

QUITTER = """
import sys

print("{}", flush=True)
sys.stdin.readline()
sys.exit("no such model")
"""


def test_requests_are_answered_and_what_else_is_printed_is_logged(tmp_path: Path) -> None:
    program, log = tmp_path / "adder.py", tmp_path / "adder.log"
    program.write_text(ADDER)
    process = PeerProcess(sys.executable, str(program), {"start": 3}, log, BENCHMARKS)
    try:
        assert process.answer() == {"ready": 3}
        for number in (4, 5):
            answer = process.ask({"number": number})
            assert answer.pop("peak_bytes") > 2**20
            assert answer == {"sum": 3 + number}
    finally:
        process.close()
    assert log.read_text() == "what a library says\n"


def test_a_peer_that_ends_says_why(tmp_path: Path) -> None:
    program = tmp_path / "quitter.py"
    program.write_text(QUITTER)
    process = PeerProcess(sys.executable, str(program), {}, tmp_path / "quitter.log", {})
    try:
        assert process.answer() == {}
        with pytest.raises(PeerError, match="ended with status 1, saying: no such model"):
            process.ask({"task": "check"})
    finally:
        process.close()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "nothing"),
        ("starting\nno such model\n\n", "no such model"),
        (
            "Traceback (most recent call last):\n  File ...\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 8GB\n"
            "--------------------\nFor simplicity, JAX has removed its internal frames from the traceback.\n\n",
            "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 8GB",
        ),
        ("ImportError: first\n\nDuring handling of it:\n\nValueError: second\n----\n", "ValueError: second"),
    ],
)
def test_the_words_of_a_peer_are_its_exception(log: str, words: str) -> None:
    assert peers_processes.last_words(log) == words
