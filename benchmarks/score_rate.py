"""Tokens a second that the engine scores, against those that it prefills, of one long text and of many short pairs.

    python benchmarks/score_rate.py
    python benchmarks/score_rate.py --num-layers 6 --width 512 --quantize int8

Weights are random, of RWKV-7. A token that is scored costs the head's product besides (2 x C x V operations), which
prefill does once a text; the last column says what that alone would make of prefill's rate. Repetitions take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference import Engine, EngineOptions
from rwkv_jax.weights.official import official_shapes


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def with_the_head(config: ModelConfig) -> float:
    """The part of prefill's rate that is left when the head is computed for every token, by matrix products alone."""
    shapes = {name: shape for name, shape in official_shapes(config).items() if len(shape) == 2}
    layers = sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("blocks."))
    return float(layers / (layers + config.width * config.vocab_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--quantize", choices=["int8", "int4", "bfloat16"])
    parser.add_argument("--num-tokens", type=int, default=2048, help="of the long text")
    parser.add_argument(
        "--num-pairs", type=int, default=32, help="contexts of 48 tokens, each with a continuation of 8"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    draws = np.random.default_rng(0)
    text = draws.integers(1, config.vocab_size, arguments.num_tokens).tolist()
    pairs = draws.integers(1, config.vocab_size, (arguments.num_pairs, 56)).tolist()
    contexts, continuations = [ids[:48] for ids in pairs], [ids[48:] for ids in pairs]
    model, tokenizer = random_model(config, arguments.quantize), NumberTokenizer(config.vocab_size)
    with Engine(model, tokenizer, EngineOptions(prefix_bytes=0)) as engine:
        del model
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "a long text, prefilled": (len(text), lambda: jax.block_until_ready(engine.prefill(None, text).logits)),
            "the same, scored": (len(text), lambda: engine.score(text)),
            "the same, scored with its 5 most likely tokens": (len(text), lambda: engine.score(text, top_logprobs=5)),
            "pairs, prefilled, and a token each": (56 * len(pairs), lambda: engine.generate(pairs, max_tokens=1)),
            "the same, their continuations scored": (56 * len(pairs), lambda: engine.score(contexts, continuations)),
        }
        for _, run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repetitions):
            for name, (_, run) in runs.items():
                times[name].append(seconds(run))
    print(describe_machine())
    print(f"RWKV-7, {config.num_layers} x {config.width}, V = {config.vocab_size}, {arguments.quantize or 'float32'}\n")
    print("| what | tokens/s (lowest - highest) | against prefill |\n|---|---|---|")
    rates = {name: runs[name][0] / statistics.median(own) for name, own in times.items()}
    for name, own in times.items():
        count, base = (
            runs[name][0],
            rates["pairs, prefilled, and a token each" if name in list(runs)[3:] else "a long text, prefilled"],
        )
        print(
            f"| {name} | **{rates[name]:,.0f}** ({count / max(own):,.0f} - {count / min(own):,.0f}) | "
            f"{rates[name] / base:.2f} |"
        )
    print(f"\nBy matrix products alone a long text's would be {with_the_head(config):.2f}.")


if __name__ == "__main__":
    main()
