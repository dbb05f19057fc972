"""How fast rows of training tokens are read from memory-mapped token files, in each order.

    python benchmarks/read_rows.py                        # a .bin of 3 GB, the size of MiniPile
    python benchmarks/read_rows.py --tokens 100000000

Writes a .bin and .idx of random World tokens into a temporary folder and opens them as a run does. Each case reads
batches at steps that it has not read before; all cases take turns, and medians are shown. The file is in the page cache
unless it is larger than memory: what a disk adds is its own rate, two bytes a token. Opening is timed, too.

A second table holds each recipe of configs/ against the best rate that its docstring has from `rwkv plan`, on H100s:
one process reads the rows of one host, in the recipe's order and of its length.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_jax.cli import load_config
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import TrainConfig
from rwkv_jax.data.corpus import Corpus, corpus_of_binidx, mix
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.data.tokens.binidx import BinidxWriter, open_binidx
from rwkv_jax.data.tokens.order import RowOrder
from rwkv_jax.data.tokens.rows import TrainingRows, training_rows

SHAPES = [(8, 512), (32, 512), (8, 4096), (32, 4096)]
ORDERS: list[RowOrder] = ["windows", "official", "streams"]
DOCUMENT_TOKENS = 2**14
CONFIGS = Path(__file__).parents[1] / "configs"
PLAN = re.compile(r"(h100:(\d+)x\d+)\b.*?at\s+best\s+([\d,]+)\s+tokens/s", re.DOTALL)
"""What the docstring of a recipe says of its plan for H100s."""


class Planned(NamedTuple):
    """A recipe and its plan."""

    name: str
    config: TrainConfig
    topology: str
    hosts: int
    tokens_per_second: float
    """Of all hosts, at best."""

    @property
    def host_rows(self) -> int:
        """Rows of a step that one host reads."""
        return self.config.training.batch_size // self.hosts


def planned_recipes(folder: Path) -> Iterator[Planned]:
    """The recipes of a folder whose docstrings have a plan for H100s."""
    for path in sorted(folder.glob("*.py")):
        found = PLAN.search(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        if found:
            topology, hosts, rate = found.groups()
            yield Planned(path.stem, load_config(path), topology, int(hosts), float(rate.replace(",", "")))


def recipe_rows(corpus: Corpus, recipe: Planned) -> TrainingRows:
    """The rows of a recipe, from another corpus than its own."""
    training = recipe.config.training
    return training_rows(
        corpus,
        order=recipe.config.data.order,
        seed=0,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
    )


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


def seconds_per_step(rows: TrainingRows, first: int, steps: int, read: slice = slice(None)) -> float:
    """Mean time of reading a batch, or some rows of it, over steps that no call has read before."""
    started = time.perf_counter()
    for step in range(first, first + steps):
        rows.read(step, read)
    return (time.perf_counter() - started) / steps


def compare_with_plans(corpus: Corpus, repetitions: int, steps: int) -> None:
    """Prints how fast each recipe's rows are read, beside how fast its plan takes them."""
    rows = {recipe: recipe_rows(corpus, recipe) for recipe in planned_recipes(CONFIGS)}
    times: dict[Planned, list[float]] = {recipe: [] for recipe in rows}
    for repetition in range(repetitions):
        for recipe, reader in rows.items():
            first = repetition * steps
            times[recipe].append(seconds_per_step(reader, first, steps, slice(recipe.host_rows)))
    print("\n| recipe | devices | order | rows of a host | planned of a host | read | times |")
    print("|---" * 7 + "|")
    for recipe, seconds in times.items():
        length, planned = recipe.config.training.sequence_length, recipe.tokens_per_second / recipe.hosts
        read = recipe.host_rows * length / statistics.median(seconds)
        shape = f"{recipe.host_rows} x {length}"
        cells = (recipe.name, recipe.topology, recipe.config.data.order, shape, f"{planned / 1e6:.2f}")
        print(f"| {' | '.join(cells)} | {read / 1e6:.0f} | {read / planned:.0f} |")


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
        compare_with_plans(corpus, arguments.repetitions, arguments.steps)


if __name__ == "__main__":
    main()
