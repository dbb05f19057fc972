"""Tokens a second of a batch that mixes adapters, against the same batch on weights that one adapter is merged into.

    python benchmarks/adapters_decode.py
    python benchmarks/adapters_decode.py --num-layers 12 --width 768 --rank 32

Weights and adapters are random, of RWKV-7, the adapters LoRA on all six matrices of a layer. Two engines of 8 slots
generate in turn: one has 4 adapters, of which each text has one, the other has the first of them merged into its
weights. It exits with 1 where the mixed batch writes less than 0.8 times the tokens. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.config.tuning import OFFICIAL_TARGETS
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.tuning.adapter import Adapter
from rwkv_jax.tuning.grafting import adapted_model
from rwkv_jax.weights.official import official_shapes

NUM_TEXTS = 8
WANTED = 0.8


def random_adapter(config: ModelConfig, rank: int, seed: int) -> Adapter:
    """LoRA of all six matrices of all layers, of small numbers."""
    draws, shapes = np.random.default_rng(seed), official_shapes(config)
    parts: dict[str, dict[str, NDArray]] = {}
    for name in (f"blocks.{layer}.{target}" for layer in range(config.num_layers) for target in OFFICIAL_TARGETS):
        num_outputs, num_inputs = shapes[f"{name}.weight"]
        sizes = {"lora_A": (rank, num_inputs), "lora_B": (num_outputs, rank)}
        parts[name] = {part: 0.01 * draws.standard_normal(size, np.float32) for part, size in sizes.items()}
    return Adapter("lora", parts, dict.fromkeys(parts, 1.0))


def merged_model(model: LanguageModel, adapter: Adapter) -> LanguageModel:
    """The model with an adapter merged into its weights."""
    graphdef, state = nnx.split(adapted_model(model, adapter), nnx.Param)

    def merged(x: Any) -> Any:
        return x.merged() if isinstance(x, AdaptedMatrix) else x

    return nnx.merge(graphdef, jax.tree.map(merged, state, is_leaf=lambda x: isinstance(x, AdaptedMatrix)))


def seconds_of(engine: Engine, names: list[str | None], num_tokens: int) -> float:
    """Seconds in which texts that have begun, one of each adapter in turn, all generate so many tokens."""
    arguments = {"sampling": SamplingParams.greedy(), "stop_ids": (), "max_tokens": num_tokens + 1}
    with engine.hold():
        streams = [engine.stream([1, 2, 3 + i], adapter=name, **arguments) for i, name in enumerate(names)]
    for stream in streams:
        next(stream)  # all prompts are read, and the first burst is over
    begin = time.perf_counter()
    for stream in streams:
        for _ in stream:
            pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--num-adapters", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=64, help="of each text")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    model, tokenizer = random_model(config, None), NumberTokenizer(config.vocab_size)
    adapters = {str(i): random_adapter(config, arguments.rank, i) for i in range(arguments.num_adapters)}
    options = EngineOptions(num_slots=NUM_TEXTS, batch_sizes=(NUM_TEXTS,), prefix_bytes=0)
    print(describe_machine())
    print(
        f"RWKV-7, {config.num_layers} x {config.width}, vocabulary {config.vocab_size}, float32; {NUM_TEXTS} texts, "
        f"{len(adapters)} adapters of rank {arguments.rank}; medians of {arguments.repetitions} repetitions in turn\n"
    )
    alone = merged_model(model, adapters["0"])
    with Engine(alone, tokenizer, options) as merged, Engine(model, tokenizer, options, adapters=adapters) as mixed:
        chosen = list(itertools.islice(itertools.cycle(adapters), NUM_TEXTS))
        rows = {"merged": (merged, [None] * NUM_TEXTS), "mixed": (mixed, chosen)}
        found: dict[str, list[float]] = {name: [] for name in rows}
        for repetition in range(1 + arguments.repetitions):
            for name, (engine, names) in rows.items():
                seconds = seconds_of(engine, names, arguments.num_tokens)
                if repetition:
                    found[name].append(seconds)
    total = NUM_TEXTS * arguments.num_tokens
    print("| batch | tokens/s (lowest - highest) |\n|---|---|")
    for name, seconds in found.items():
        lowest, highest = total / max(seconds), total / min(seconds)
        print(f"| {name} | **{total / statistics.median(seconds):,.0f}** ({lowest:,.0f} - {highest:,.0f}) |")
    ratios = [a / b for a, b in zip(found["merged"], found["mixed"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"\nmixed / merged: {ratio:.2f} (median of pairs, {min(ratios):.2f} - {max(ratios):.2f})")
    sys.exit(0 if ratio >= WANTED else 1)


if __name__ == "__main__":
    main()
