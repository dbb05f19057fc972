"""What each program beside benchmarks/decode_cpu.py is: a model that reads tokens, asked what `Request` says.

Needs NumPy only, so that it can be imported in every peer's own environment.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peers_processes

WARM_UP_TOKENS = 16
"""Decoded before the clock starts, in a turn: another process has had the caches since the last one."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a peer is to open."""

    weights: str
    """A file of float32 tensors under official names: .pth, beside which stands the same as .gguf for llama.cpp."""
    precision: str
    """In which the weights are held, as the peer calls it."""
    max_batch_size: int
    max_length: int
    """Tokens of the longest prompt."""
    threads: int
    scratch: str
    """A folder for what the peer must write first, shared by all."""


class Peer(abc.ABC):
    """A model with the states of some texts."""

    def __init__(self) -> None:
        self._last = np.zeros(0, np.int32)

    @abc.abstractmethod
    def begin(self, batch_size: int) -> None:
        """Begin so many texts, with nothing read."""

    @abc.abstractmethod
    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Read tokens [B, T] of the texts begun; the logits [B, V] after the last of them, on the host."""

    def start(self, tokens: NDArray[np.int32]) -> None:
        """Begin as many texts as there are tokens [B], each with one of them."""
        self.begin(len(tokens))
        self._last = tokens

    def write(self, num_tokens: int) -> NDArray[np.int32]:
        """Go on with the texts started, always with the likeliest token: [B, num_tokens]."""
        chosen = np.empty((len(self._last), num_tokens), np.int32)
        for step in range(num_tokens):
            chosen[:, step] = np.argmax(self.read(self._last[:, None]), axis=-1)
            self._last = chosen[:, step]
        return chosen


@dataclasses.dataclass(frozen=True)
class Request:
    """What a peer is asked for."""

    task: str
    """`check`, `decode` or `prefill`."""
    tokens: str
    """A .npy file of token ids [T]; text b of a batch begins at its b-th token."""
    batch_size: int = 1
    num_tokens: int = 1
    """To decode; of the prompt."""
    output: str = ""
    """Of `check`: the .npz file to write."""


def answer(peer: Peer, request: Request) -> dict[str, Any]:
    """Do what is asked; `seconds` of what is timed."""
    tokens = np.load(request.tokens)
    if request.task == "check":
        np.savez(request.output, allow_pickle=False, **outputs(peer, tokens[: request.num_tokens], request.batch_size))
        return {}
    if request.task == "prefill":
        peer.begin(1)
        return {"seconds": timed(lambda: peer.read(tokens[None, : request.num_tokens]))}
    if request.task == "decode":
        peer.start(tokens[: request.batch_size])
        peer.write(WARM_UP_TOKENS)
        return {"seconds": timed(lambda: peer.write(request.num_tokens))}
    raise ValueError(f"task = {request.task!r}: must be check, decode or prefill")


def outputs(peer: Peer, tokens: NDArray[np.int32], batch_size: int) -> dict[str, NDArray]:
    """What tells whether this is the same model, in each of the ways that are timed.

    Args:
      tokens: [T].

    Returns:
      `prefill` [V], after all tokens in one call; `decode` [T, V], one token a call; and where more than one text is
      decoded at a time, `batch` [B, V], after texts that were read side by side. `greedy` [B, 8] is what is written,
      `greedy_by_reading` what it should be, by calls of one token.
    """
    tokens = tokens.astype(np.int32)
    peer.begin(1)
    found = {"prefill": peer.read(tokens[None])[0].copy()}
    peer.begin(1)
    found["decode"] = np.stack([peer.read(token[None, None])[0].copy() for token in tokens])
    if batch_size > 1:
        # Text b begins at token b, so that all differ.
        rows = np.stack([np.roll(tokens, -row) for row in range(batch_size)])
        peer.begin(batch_size)
        for step in range(len(tokens)):
            found["batch"] = peer.read(rows[:, step : step + 1]).copy()
    peer.start(tokens[:batch_size])
    found["greedy"] = peer.write(8)
    Peer.start(peer, tokens[:batch_size])
    found["greedy_by_reading"] = Peer.write(peer, 8)
    return found


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def serve(open_peer: Callable[[Job], tuple[Peer, dict[str, str]]]) -> None:
    """Open the job given on the command line, then answer requests until standard input closes.

    Args:
      open_peer: makes the peer, and says which versions of which packages it is.
    """

    def open_job(job: dict[str, Any]) -> tuple[dict[str, Any], peers_processes.Answer]:
        peer, versions = open_peer(Job(**job))
        return {"versions": versions}, lambda request: answer(peer, Request(**request))

    peers_processes.serve(open_job)
