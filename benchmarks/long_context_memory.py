"""Peak memory of reading a long text with the state carried, by its length: flat, but for the text and its losses.

    python benchmarks/long_context_memory.py
    python benchmarks/long_context_memory.py --num-layers 12 --width 768 --vocab-size 65536

Weights are random, of RWKV-7, and so are the tokens. One process reads texts of growing length (`loss_by_position`, as
`rwkv probe --probes positions` does) and after each asks the system for its largest resident memory so far. What grows
is the text's own: a number for each token and one for each loss. The last column is what a Transformer of these sizes
would hold besides, keys and values of every token, computed and not measured. The status is 1 if the longest text takes
more than the shortest by as much as `--bytes-per-token` for each token.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import time

import numpy as np

from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.evaluation.engine_scorer import options_for
from rwkv_jax.evaluation.limits.positions import loss_by_position
from rwkv_jax.inference import Engine

MIB = 2**20


def peak_bytes() -> int:
    """The process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="ascending")
    parser.add_argument("--bytes-per-token", type=int, default=512, help="of growth that are allowed")
    arguments = parser.parse_args()
    if any(a >= b for a, b in itertools.pairwise(arguments.lengths)) or len(arguments.lengths) < 2:
        parser.error("--lengths: give two at least, each longer than the one before")
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    model = random_model(config)
    draws = np.random.default_rng(0)
    print(describe_machine())
    print(f"RWKV-7, {config.num_layers} x {config.width}, V = {config.vocab_size}, float32\n")
    print("| tokens | seconds | peak memory, MiB | state, MiB | keys and values of a Transformer, MiB |")
    print("|---|---|---|---|---|")
    peaks = []
    with Engine(model, NumberTokenizer(config.vocab_size), options_for(model, tune="never")) as engine:
        text = draws.integers(1, config.vocab_size, arguments.lengths[-1]).tolist()
        loss_by_position(engine, [text[: arguments.lengths[0]]])  # compiles, which takes memory of its own
        for length in arguments.lengths:
            start = time.perf_counter()
            found = loss_by_position(engine, [text[:length]])
            seconds = time.perf_counter() - start
            peaks.append(peak_bytes())
            cache = 2 * config.num_layers * config.width * 4 * length
            print(
                f"| {length:,} | {seconds:.1f} | {peaks[-1] / MIB:.1f} | {found.state_bytes / MIB:.2f} "
                f"| {cache / MIB:.0f} |",
                flush=True,
            )
            assert all(np.isfinite(each.loss) for each in found.losses)
    growth = (peaks[-1] - peaks[0]) / (arguments.lengths[-1] - arguments.lengths[0])
    print(f"\nfrom the shortest to the longest text memory grew by {growth:.0f} bytes a token")
    sys.exit(growth > arguments.bytes_per_token)


if __name__ == "__main__":
    main()
