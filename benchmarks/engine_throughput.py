"""Tokens a second of the engine with 1, 4, 16 and 64 texts at once.

    python benchmarks/engine_throughput.py
    python benchmarks/engine_throughput.py --num-layers 6 --width 512 --quantize int8

Weights are random, of RWKV-7. Texts are written greedily after prompts of one token, past the first tokens of each,
which also compile. Numbers of texts take turns (1 4 16 64 1 4 ...), medians are quoted; the engine has a program for
each number. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine
from number_tokenizer import NumberTokenizer
from peers_weights import RandomWeights
from rwkv_jax import from_pretrained
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine import Engine, EngineOptions
from rwkv_jax.inference.sampling import Sampling
from rwkv_jax.weights.safetensors_file import write_safetensors


def random_engine(config: ModelConfig, batch_sizes: Sequence[int], quantize: str | None) -> Engine:
    """An engine with random weights and a program for each number of texts."""
    options: dict[str, Any] = {} if quantize is None else {"quantize": quantize}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write_safetensors(path, RandomWeights(config))
        model = from_pretrained(path, **options)
    sizes = EngineOptions(num_slots=max(batch_sizes), batch_sizes=tuple(batch_sizes), prefix_bytes=0)
    return Engine(model, NumberTokenizer(config.vocab_size), sizes)


def seconds_to_write(engine: Engine, batch_size: int, num_tokens: int) -> float:
    """To write so many tokens of each of so many texts, which have been begun before."""
    burst = engine.options.burst_length
    prompts = [[token] for token in range(1, batch_size + 1)]
    # What is measured begins and ends with a burst.
    arguments: dict[str, Any] = {"max_tokens": burst + num_tokens, "stop_ids": (), "sampling": Sampling(temperature=0)}
    with engine.stream(prompts, **arguments) as stream:
        for _ in range(batch_size * burst):
            next(stream)
        began = time.perf_counter()
        num_written = sum(len(chunk.ids) for chunk in stream)
        seconds = time.perf_counter() - began
    assert num_written == batch_size * num_tokens
    return seconds


def measure(engine: Engine, batch_sizes: Sequence[int], num_tokens: int, repetitions: int) -> dict[int, list[float]]:
    """Tokens a second of each number of texts, a repetition each in turn."""
    found: dict[int, list[float]] = {batch_size: [] for batch_size in batch_sizes}
    for repetition, batch_size in itertools.product(range(repetitions + 1), batch_sizes):
        seconds = seconds_to_write(engine, batch_size, num_tokens)
        if repetition:  # the first compiles
            found[batch_size].append(batch_size * num_tokens / seconds)
    return found


def report(found: dict[int, list[float]]) -> str:
    """The table, in Markdown, and whether throughput rises all the way."""
    medians = {batch_size: statistics.median(rates) for batch_size, rates in found.items()}
    first = next(iter(medians.values()))
    lines = ["| texts at once | tokens/s (lowest - highest) | against one | ms a token of each |", "|---|---|---|---|"]
    lines += [
        f"| {batch_size} | **{median:,.0f}** ({min(found[batch_size]):,.0f} - {max(found[batch_size]):,.0f}) | "
        f"{median / first:.2f} x | {1e3 * batch_size / median:.1f} |"
        for batch_size, median in medians.items()
    ]
    rises = all(a < b for a, b in itertools.pairwise(medians.values()))
    return "\n".join([*lines, "", f"rises from each to the next: {'yes' if rises else 'NO'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--quantize", choices=["int8", "int4", "bfloat16"])
    parser.add_argument("--num-tokens", type=int, default=32, help="timed, of each text; a multiple of 8")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    print(describe_machine())
    print(
        f"RWKV-7, {config.num_layers} x {config.width}, vocabulary {config.vocab_size}, "
        f"{arguments.quantize or 'float32'}; medians of {arguments.repetitions} repetitions in turn\n"
    )
    batch_sizes = sorted(set(arguments.batch_sizes))
    engine = random_engine(config, batch_sizes, arguments.quantize)
    print(report(measure(engine, batch_sizes, arguments.num_tokens, arguments.repetitions)))


if __name__ == "__main__":
    main()
