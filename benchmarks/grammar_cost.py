"""What a JSON schema costs: tokens a second of texts that match it, against texts that may be anything.

    python benchmarks/grammar_cost.py
    python benchmarks/grammar_cost.py --num-layers 6 --width 512 --batch-sizes 1 8

Weights are random, of RWKV-7, with the World vocabulary. A text that matches gets its tokens one by one, since the host
computes a mask before each; so the same texts without a schema are also timed in bursts of one. Repetitions take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

from rwkv_jax.bench.random_model import random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.inference import Engine, EngineOptions, Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 400, "maxLength": 2000},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def rate(engine: Engine, count: int, num_tokens: int, grammar: Grammar | None) -> tuple[float, float]:
    """Tokens a second, and milliseconds of masks for each step."""
    before, start = engine.stats(), time.perf_counter()
    engine.generate([f"{i}: " for i in range(count)], max_tokens=num_tokens, stop_ids=(), grammar=grammar)
    took, after = time.perf_counter() - start, engine.stats()
    num_generated = after.generated_tokens - before.generated_tokens
    return num_generated / took, 1e3 * (after.mask_seconds - before.mask_seconds) * count / num_generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig(vocab_size=65536, num_layers=arguments.num_layers, width=arguments.width)
    print(describe_machine())
    print(f"RWKV-7, {config.num_layers} x {config.width}, V = 65536, float32; {arguments.num_tokens} tokens a text\n")
    print("| texts at once | bursts of 8 | bursts of 1 | with a schema | against bursts of 1 | ms of masks a step |")
    print("|---|---|---|---|---|---|")
    grammar, model, tokenizer = Grammar.json_schema(SCHEMA), random_model(config), load_tokenizer("world", 65536)
    options = EngineOptions(num_slots=max(arguments.batch_sizes), batch_sizes=tuple(arguments.batch_sizes))
    with Engine(model, tokenizer, options) as engine:
        for count in arguments.batch_sizes:
            with Engine(
                model, tokenizer, EngineOptions(num_slots=count, batch_sizes=(count,), burst_length=1)
            ) as single:
                runs = [(engine, None), (single, None), (engine, grammar)]
                for of, what in runs:
                    rate(of, count, 9, what)
                found = [
                    [rate(of, count, arguments.num_tokens, what) for of, what in runs]
                    for _ in range(arguments.repetitions)
                ]
            rates = [statistics.median(own[i][0] for own in found) for i in range(3)]
            masks = statistics.median(own[2][1] for own in found)
            print(
                f"| {count} | {rates[0]:.1f} | {rates[1]:.1f} | **{rates[2]:.1f}** | {rates[2] / rates[1]:.2f} | "
                f"{masks:.2f} |"
            )


if __name__ == "__main__":
    main()
