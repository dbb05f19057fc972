"""Tokens a second of the engine with 1, 4, 16 and 64 texts at once, and whether they rise with the number.

    python benchmarks/engine_throughput.py
    python benchmarks/engine_throughput.py --num-layers 6 --width 512 --quantize int8

Weights are random, of RWKV-7. One engine has a program for each number; `rwkv_jax.bench.measure.throughput` says
what is timed, and `rwkv bench throughput` measures trained weights the same way. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence

from rwkv_jax.bench.measure import Timing, throughput
from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.weights.quantized import Quantization


def random_engine(config: ModelConfig, batch_sizes: Sequence[int], quantize: Quantization | None) -> Engine:
    """An engine with random weights and a program for each number of texts."""
    options = EngineOptions(num_slots=max(batch_sizes), batch_sizes=tuple(batch_sizes), prefix_bytes=0)
    return Engine(random_model(config, quantize), NumberTokenizer(config.vocab_size), options)


def report(found: Mapping[int, Timing]) -> str:
    """The table, in Markdown, and whether throughput rises all the way."""
    medians = {batch_size: batch_size / timing.median for batch_size, timing in found.items()}
    first = next(iter(medians.values()))
    lines = ["| texts at once | tokens/s (lowest - highest) | against one | ms a token of each |", "|---|---|---|---|"]
    for batch_size, timing in found.items():
        lowest, highest = batch_size / max(timing.seconds), batch_size / min(timing.seconds)
        lines.append(
            f"| {batch_size} | **{medians[batch_size]:,.0f}** ({lowest:,.0f} - {highest:,.0f}) | "
            f"{medians[batch_size] / first:.2f} x | {1e3 * timing.median:.1f} |"
        )
    rises = all(a < b for a, b in itertools.pairwise(medians.values()))
    return "\n".join([*lines, "", f"rises from each to the next: {'yes' if rises else 'NO'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--quantize", choices=["int8", "int4", "bfloat16"])
    parser.add_argument("--num-tokens", type=int, default=32, help="timed, of each text, in whole bursts of 8")
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
    engines = dict.fromkeys(batch_sizes, engine)
    print(report(throughput(engines, num_tokens=arguments.num_tokens, repetitions=arguments.repetitions)))


if __name__ == "__main__":
    main()
