"""ROSA's lookups of long and of many sequences: seconds and memory on one core; `python benchmarks/rosa.py --help`.

Prints Markdown, which is in benchmarks/README.md. One process for each case, whose peak of memory is then its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[NDArray, NDArray, NDArray]


def fibonacci(count: int) -> NDArray:
    """The Fibonacci word 0 1 0 0 1 ..., in which every prefix comes back."""
    before, word = [0], [0, 1]
    while len(word) < count:
        before, word = word, word + before
    return np.array(word[:count])


def itself(tokens: NDArray) -> Tokens:
    return tokens, tokens, tokens


def draws() -> np.random.Generator:
    return np.random.default_rng(0)


SEQUENCES: dict[str, Callable[[int], Tokens]] = {
    "random, 2 symbols": lambda count: itself(draws().integers(0, 2, count)),
    "random, 16 symbols": lambda count: itself(draws().integers(0, 16, count)),
    "random, 65536 symbols": lambda count: itself(draws().integers(0, 65536, count)),
    "all equal": lambda count: itself(np.zeros(count, int)),
    "period 1000": lambda count: itself(draws().integers(0, 2, 1000)[np.arange(count) % 1000]),
    "Fibonacci word": lambda count: itself(fibonacci(count)),
    "random queries, equal keys": lambda count: (
        draws().integers(0, 2, count),
        np.zeros(count, int),
        np.zeros(count, int),
    ),
}


def one(name: str, count: int, compiled: bool) -> str:
    """Seconds and peak memory of one sequence, in this process."""
    from rwkv_kernels.rosa.automaton import SuffixAutomaton

    SuffixAutomaton(compiled=compiled).read(np.arange(300) % 7)  # compiles, growing too
    tokens = SEQUENCES[name](count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    SuffixAutomaton(compiled=compiled).read(*tokens)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{seconds:.1f} s, {peak / 1024:.0f} MB"


def layer(time_steps: int, groups: int, implementation: str) -> str:
    """Seconds of one layer's lookups of 4 bits, forward, in this process."""
    import jax
    import jax.numpy as jnp

    from rwkv_kernels.rosa import rosa_lookup

    symbols = [jnp.asarray(draws().integers(0, 16, (1, groups, time_steps)), jnp.uint8) for _ in range(3)]

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return rosa_lookup(q, k, v, window=time_steps, implementation=implementation).symbols

    run(*symbols).block_until_ready()
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        run(*symbols).block_until_ready()
        found.append(time.perf_counter() - begin)
    return f"{1000 * min(found):.0f} ms"


def decode(window: int, groups: int) -> str:
    """Milliseconds of one layer's lookups of one token, of a text that fills its window, in this process."""
    import jax
    import jax.numpy as jnp

    from rwkv_kernels.rosa import RosaState, empty_state, rosa_lookup

    @functools.partial(jax.jit, donate_argnums=0)
    def burst(state: RosaState, tokens: jax.Array) -> tuple[RosaState, jax.Array]:
        def step(state: RosaState, token: jax.Array) -> tuple[RosaState, jax.Array]:
            found = rosa_lookup(token[0], token[1], token[2], state, window=window)
            return found.state, found.symbols

        return jax.lax.scan(step, state, tokens)

    tokens = jnp.asarray(draws().integers(0, 16, (32, 3, 1, groups, 1)), jnp.uint8)
    state = jax.tree.map(jnp.copy, empty_state(1, groups, window)._replace(count=jnp.array([window], jnp.int32)))
    found = []
    for _ in range(6):
        begin = time.perf_counter()
        state, symbols = jax.block_until_ready(burst(state, tokens))
        found.append((time.perf_counter() - begin) / len(symbols))
    return f"{1000 * min(found):.2f} ms"


def in_a_process(*arguments: str) -> str:
    """What this file prints in a process of its own, on one core."""
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--interpreted", action="store_true", help="without Numba")
    parser.add_argument("--layers", action="store_true", help="times of layers in place of sequences")
    parser.add_argument("--decode", action="store_true", help="times of a layer's token, by its window")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        kind, *rest = given.case
        if kind == "one":
            print(one(rest[0], int(rest[1]), rest[2] == "1"))
        elif kind == "decode":
            print(decode(int(rest[0]), int(rest[1])))
        else:
            print(layer(int(rest[0]), int(rest[1]), rest[2]))
        return
    if given.decode:
        print("| S | a token |\n|---|---|")
        for window in (256, 1024, 4096, 16384):
            print(f"| {window} | {in_a_process('--case', 'decode', str(window), '192')} |", flush=True)
        return
    if given.layers:
        print("| T | scan | host |\n|---|---|---|")
        for steps in (128, 512, 2048):
            cells = [in_a_process("--case", "layer", str(steps), "192", name) for name in ("scan", "host")]
            print(f"| {steps} | {' | '.join(cells)} |", flush=True)
        return
    print(
        "| sequence |"
        + "".join(f" {count} tokens |" for count in given.tokens)
        + "\n|---" * (1 + len(given.tokens))
        + "|"
    )
    for name in SEQUENCES:
        compiled = str(int(not given.interpreted))
        cells = [in_a_process("--case", "one", name, str(count), compiled) for count in given.tokens]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
