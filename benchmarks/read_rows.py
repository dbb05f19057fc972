"""How fast rows of training tokens are read from memory-mapped token files, in each order.

    python benchmarks/read_rows.py                        # a .bin of 3 GB, the size of MiniPile
    python benchmarks/read_rows.py --tokens 100000000

Writes a .bin and .idx of random World tokens into a temporary folder and opens them as train.py does. Each case reads
batches at steps that it has not read before; all cases take turns, and medians are shown. The file is in the page cache
unless it is larger than memory: what a disk adds is its own rate, two bytes a token. Opening is timed, too.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from machine import describe_machine
from rwkv_jax.data.binidx import BinidxWriter, open_binidx
from rwkv_jax.data.corpus import Corpus, corpus_of_binidx, mix
from rwkv_jax.data.order import RowOrder
from rwkv_jax.data.rows import TrainingRows, training_rows
from rwkv_jax.data.tokenizers import WorldTokenizer

SHAPES = [(8, 512), (32, 512), (8, 4096), (32, 4096)]
ORDERS: list[RowOrder] = ["windows", "official", "streams"]
DOCUMENT_TOKENS = 2**14


def write_tokens(target: Path, num_tokens: int) -> tuple[Path, Path]:
    """Writes documents of random tokens; returns the .bin and the .idx."""
    random = np.random.default_rng(0)
    with BinidxWriter(target, 65536) as writer:
        while writer.num_tokens < num_tokens:
            writer.write(random.integers(1, 65530, DOCUMENT_TOKENS - 1, dtype=np.int64))
            writer.write([0])
            writer.end_document()
    return writer.paths


def cases(corpus: Corpus) -> dict[str, Callable[..., TrainingRows]]:
    """What makes the rows of each order, given batch_size and sequence_length."""
    made = {order: functools.partial(training_rows, corpus, order=order, seed=0) for order in ORDERS}
    mixture = mix([corpus] * 3, (2048, 1024, 1024))
    return made | {"mixture of 3": functools.partial(training_rows, mixture, order="windows", seed=0)}


def seconds_per_step(rows: TrainingRows, first: int, steps: int) -> float:
    """Mean time of reading a batch, over steps that no call has read before."""
    started = time.perf_counter()
    for step in range(first, first + steps):
        rows.read(step)
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_500_000_000)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50, help="steps in each repetition")
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        pair = write_tokens(Path(folder) / "tokens", arguments.tokens)
        print(f"written in {time.perf_counter() - started:.1f} s: {pair[0].stat().st_size / 1e9:.2f} GB")
        started = time.perf_counter()
        corpus = corpus_of_binidx(open_binidx(*pair), WorldTokenizer(), 0.0)
        print(f"opened and checked in {time.perf_counter() - started:.2f} s")
        print("million tokens/s | " + " | ".join(f"{batch} x {length}" for batch, length in SHAPES))
        rows = {
            (name, shape): make(batch_size=shape[0], sequence_length=shape[1])
            for name, make in cases(corpus).items()
            for shape in SHAPES
        }
        times: dict[tuple[str, tuple[int, int]], list[float]] = {case: [] for case in rows}
        for repetition in range(arguments.repetitions):
            for case, reader in rows.items():
                times[case].append(seconds_per_step(reader, repetition * arguments.steps, arguments.steps))
        for name in cases(corpus):
            rates = [batch * length / statistics.median(times[name, (batch, length)]) for batch, length in SHAPES]
            print(f"{name:16} | " + " | ".join(f"{rate / 1e6:8.1f}" for rate in rates))


if __name__ == "__main__":
    main()
