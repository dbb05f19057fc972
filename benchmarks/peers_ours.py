"""This library as a row of benchmarks/decode_cpu.py: the engine, as whoever uses it has it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers_protocol import Job, Peer, serve
from rwkv_jax import from_pretrained
from rwkv_jax.bench.random_model import NumberTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot

MOST_TOKENS = 1 << 20
"""Of a text; it is given up long before."""


class Ours(Peer):
    """An engine. Prompts are read one by one, as a snapshot each; texts are written side by side."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._snapshots: Sequence[Snapshot | None] = ()
        self._stream: Stream | None = None

    def begin(self, batch_size: int) -> None:
        """See Peer."""
        self._give_up()
        self._snapshots = [None] * batch_size

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See Peer."""
        rows = zip(self._snapshots, tokens.tolist(), strict=True)
        self._snapshots = snapshots = [self._engine.prefill(snapshot, row) for snapshot, row in rows]
        return np.stack([np.asarray(snapshot.logits) for snapshot in snapshots])

    def start(self, tokens: NDArray[np.int32]) -> None:
        """See Peer."""
        self.begin(len(tokens))
        prompts = tokens[:, None].tolist()
        likeliest = SamplingParams(temperature=0)
        self._stream = self._engine.stream(prompts, max_tokens=MOST_TOKENS, sampling=likeliest, stop_ids=())

    def write(self, num_tokens: int) -> NDArray[np.int32]:
        """See Peer."""
        assert self._stream is not None
        written: list[list[int]] = [[] for _ in self._snapshots]
        for chunk in self._stream:
            written[chunk.index] += chunk.ids
            if all(len(row) >= num_tokens for row in written):
                break
        return np.array(written, np.int32)

    def _give_up(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._stream = None


def open_peer(job: Job) -> tuple[Peer, dict[str, str]]:
    """An engine with the weights of a job, and versions."""
    options: dict[str, Any] = {} if job.precision == "float32" else {"quantize": job.precision}
    model = from_pretrained(job.weights, **options)
    # No prompt is to be found among those of earlier repetitions.
    sizes = EngineOptions(num_slots=job.max_batch_size, prefix_bytes=0)
    engine = Engine(model, NumberTokenizer(model.config.vocab_size), sizes)
    return Ours(engine), {name: importlib.metadata.version(name) for name in ("jax", "flax")}


if __name__ == "__main__":
    serve(open_peer)
