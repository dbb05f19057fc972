"""What it saves to read a shared beginning once, on a load shaped like HellaSwag's: questions with four endings each.

    python benchmarks/evaluation_prefix.py
    python benchmarks/evaluation_prefix.py --num-layers 12 --width 768 --vocab-size 65536

Weights are random, of RWKV-7, and so are the tokens. A context is some examples and a question, all of the same length;
each of its endings is scored. `each` reads the whole context before every ending (an engine without a prefix cache);
`once` is `EngineScorer`. Examples are either drawn for every question, so that only its four endings share anything, or
the same for all of them. The variants take turns, and medians are shown. Both must agree on the log-probabilities.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.evaluation.encoding import Pair
from rwkv_jax.evaluation.engine_scorer import EngineScorer, options_for
from rwkv_jax.inference import Engine

NUM_ENDINGS = 4
WANTED_RATIO = 3.0
TOLERANCE = 1e-3
"""Largest difference of a log-probability, as a part of its own size."""


def load(arguments: argparse.Namespace, seed: int, *, same_examples: bool) -> list[Pair]:
    """Contexts and endings; the question and each example have the same number of tokens."""
    draws = np.random.default_rng(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(draws.integers(1, arguments.vocab_size, length).tolist())

    examples = text(arguments.num_fewshot * arguments.example_length)
    pairs = []
    for _ in range(arguments.num_questions):
        if not same_examples:
            examples = text(arguments.num_fewshot * arguments.example_length)
        context = (0, *examples, *text(arguments.example_length))
        pairs += [Pair(context, text(arguments.ending_length)) for _ in range(NUM_ENDINGS)]
    return pairs


def seconds(engine: Engine, pairs: Sequence[Pair], *, once: bool) -> tuple[float, list[float]]:
    """Time and log-probabilities of one evaluation."""
    start = time.perf_counter()
    if once:
        found = [result.logprob for result in EngineScorer(engine).score_ids(pairs)]
    else:
        contexts, endings = zip(*pairs, strict=True)
        found = [score.logprob for score in engine.score(contexts, endings)]
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--num-questions", type=int, default=8)
    parser.add_argument("--num-fewshot", type=int, default=10)
    parser.add_argument("--example-length", type=int, default=96, help="tokens of an example and of the question")
    parser.add_argument("--ending-length", type=int, default=28)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    model, tokenizer = random_model(config), NumberTokenizer(config.vocab_size)
    options = options_for(model)
    loads = {"drawn for every question": False, "the same for all": True}
    print(describe_machine())
    print(
        f"RWKV-7, {config.num_layers} x {config.width}, V = {config.vocab_size}; {arguments.num_questions} questions, "
        f"{NUM_ENDINGS} endings each of {arguments.ending_length} tokens after {arguments.num_fewshot} examples, "
        f"{arguments.example_length} tokens each\n"
    )
    print("| examples | each, s | once, s | each / once |\n|---|---|---|---|")
    failed = False
    with (
        Engine(model, tokenizer, dataclasses.replace(options, prefix_bytes=0)) as each,
        Engine(model, tokenizer, options) as once,
    ):
        del model
        for name, same_examples in loads.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            differences = []
            for repetition in range(arguments.repetitions + 1):  # the first one compiles
                pairs = load(arguments, repetition, same_examples=same_examples)  # so that no state is there yet
                slow, wanted = seconds(each, pairs, once=False)
                fast, found = seconds(once, pairs, once=True)
                differences += [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
                if repetition:
                    times[False].append(slow)
                    times[True].append(fast)
            slow, fast = (statistics.median(times[is_once]) for is_once in (False, True))
            failed |= slow / fast < WANTED_RATIO or max(differences) > TOLERANCE
            print(f"| {name} | {slow:.2f} | {fast:.2f} | **{slow / fast:.1f}** |", flush=True)
            print(f"log-probabilities differ by {max(differences):.1e} of their size at most", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
