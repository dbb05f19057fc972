"""Time, memory, compile time and growth with T of every operator on a CPU, forward, and forward with backward.

    python benchmarks/wkv_cpu.py
    PYTHONPATH=kernels PATH_TO_A_PYTHON benchmarks/wkv_cpu.py --peer    # beside rwkv_ops

The second interpreter belongs to an environment made with

    pip install rwkv_ops==0.11.3 keras jax==0.10.2

float32. All rows of an operator are measured in turns in one run, and medians are printed, so that a change of the
machine's speed meets all of them alike. Absolute figures do not carry to another machine; the ratios nearly do.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_kernels
from rwkv_jax.cli.machine import describe_machine
from rwkv_kernels import dispatch
from rwkv_kernels.testing.cases import Shape
from wkv_problems import Inputs, as_dtype, call, make_inputs, medians, with_backward

SHAPE = Shape(4, 1024, 8, 64, 64)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
PEER = "rwkv_ops, native"
STRONG = "chunked, strong decays"


def slope(lengths: Sequence[int], times: Sequence[float]) -> float:
    """Exponent of T in a least-squares fit of time ~ T^exponent."""
    x, y = [math.log(t) for t in lengths], [math.log(t) for t in times]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def peer_rows(operator: str) -> dict[str, Callable[[Inputs], Any]]:
    """rwkv_ops' recurrences by its JAX route; it has RWKV-6 and 7 only, and no gradient of RWKV-6."""
    from rwkv_ops import generalized_delta_rule, rwkv6_op  # pyright: ignore[reportMissingImports]

    def wkv7(inputs: Inputs) -> Any:
        r, log_w, k, v, a, b = (inputs[name] for name in ("r", "log_w", "k", "v", "a", "b"))
        w = jnp.log(-log_w)  # its decay is exp(-exp(w))
        return generalized_delta_rule(r, w, k, v, a, b, initial_state=inputs["state"], output_final_state=True)

    def wkv6(inputs: Inputs) -> Any:
        batch, time_steps, heads, key_dim = inputs["r"].shape
        r, log_w, k, v = (inputs[n].reshape(batch, time_steps, -1) for n in ("r", "log_w", "k", "v"))
        state = inputs["state"].swapaxes(-1, -2)
        y, state = rwkv6_op(r, k, v, jnp.log(-log_w), inputs["u"], state, True)
        return y.reshape(batch, time_steps, heads, key_dim), state.swapaxes(-1, -2)

    return {PEER: {"wkv6": wkv6, "wkv7": wkv7}[operator]} if operator in ("wkv6", "wkv7") else {}


def check_peer(peer: Callable[[Inputs], Any], ours: Callable[[Inputs], Any], inputs: Inputs) -> None:
    """Refuses to time a peer that computes something else."""
    for theirs, mine in zip(jax.tree.leaves(peer(inputs)), jax.tree.leaves(ours(inputs)), strict=True):
        error = np.linalg.norm(theirs - mine) / np.linalg.norm(mine)
        if not error < 1e-4:
            raise SystemExit(f"the peer's numbers differ from ours by {error:.1e} in relative L2: nothing to compare")


def compare(operator: str, repetitions: int, with_peer: bool, chunk_sizes: Sequence[int]) -> None:
    """Prints the table of one operator at SHAPE."""
    inputs = as_dtype(make_inputs(operator, SHAPE), jnp.float32)
    names = [n for n in rwkv_kernels.implementations(operator) if not n.startswith("pallas")]
    rows = {name: call(operator, name) for name in names}
    for size in chunk_sizes:
        run = functools.partial(rwkv_kernels.OPERATORS[operator].implementations["chunked"].run, chunk_size=size)
        rows[f"chunked by {size}"] = call(operator, dispatch.Implementation(run, dispatch.anything))
    given = dict.fromkeys(rows, inputs)
    if operator in ("wkv5", "wkv6"):
        # The realistic decays are weak enough for the faster of its two forms; these are not.
        rows[STRONG] = call(operator, "chunked")
        given[STRONG] = as_dtype(make_inputs(operator, SHAPE, "mixed_decay"), jnp.float32)
    if with_peer:
        for name, peer in peer_rows(operator).items():
            check_peer(jax.jit(peer), jax.jit(rows["chunked"]), inputs)
            rows[name], given[name] = peer, inputs
    forward = {name: jax.jit(function).lower(inputs).compile() for name, function in rows.items()}
    both, seconds = {}, {}
    for name, function in rows.items():
        if (operator, name) == ("wkv6", PEER):
            continue  # raises: a while loop has no reverse-mode gradient
        started = time.perf_counter()
        both[name] = jax.jit(with_backward(function)).lower(inputs).compile()
        seconds[name] = time.perf_counter() - started
    forward_ms = medians(forward, given, repetitions)
    both_ms = medians(both, given, repetitions)
    memory = {name: f.memory_analysis().temp_size_in_bytes / 2**20 for name, f in both.items()}
    print(f"\n{operator}, {' '.join(f'{a}{b}' for a, b in zip('BTHNM', SHAPE, strict=True))}, float32")
    columns = "implementation|forward ms|forward + backward ms|against scan|temporary MiB|against scan|compile s"
    print(f"| {' | '.join(columns.split('|'))} |")
    print("|---|---|---|---|---|---|---|")
    for name in rows:
        if name not in both:
            print(f"| {name} | {forward_ms[name]:.0f} | has no gradient | | | | |")
            continue
        print(
            f"| {name} | {forward_ms[name]:.0f} | {both_ms[name]:.0f} | {both_ms['scan'] / both_ms[name]:.1f}x faster "
            f"| {memory[name]:.0f} | {memory[name] / memory['scan']:.3f} | {seconds[name]:.1f} |"
        )


def grow(operator: str, repetitions: int) -> None:
    """Prints the default implementation's times over LENGTHS."""
    times = []
    for length in LENGTHS:
        inputs = as_dtype(make_inputs(operator, Shape(1, length, 4, 64, 64)), jnp.float32)
        compiled = jax.jit(with_backward(call(operator, None))).lower(inputs).compile()
        times.append(medians({"": compiled}, {"": inputs}, repetitions)[""])
    print(f"| {operator} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {slope(LENGTHS, times):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--peer", action="store_true", help="also time rwkv_ops, which must be installed")
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=[], help="also time chunks of these sizes")
    parser.add_argument("--operators", nargs="+", default=list(rwkv_kernels.OPERATORS))
    arguments = parser.parse_args()
    if arguments.peer:
        # Read by rwkv_ops and Keras when they are imported; without KERAS_HOME, Keras writes to the user's home.
        scratch = tempfile.mkdtemp()
        os.environ |= {"KERNEL_BACKEND": "jax", "KERAS_BACKEND": "jax", "KERNEL_TYPE": "native", "KERAS_HOME": scratch}
    print(describe_machine())
    for operator in arguments.operators:
        compare(operator, arguments.repetitions, arguments.peer, arguments.chunk_sizes)
    print("\nGrowth: B1 H4 N64, float32, forward + backward by the default implementation, ms")
    print("| T | " + " | ".join(map(str, LENGTHS)) + " | slope |")
    print("|---" * (len(LENGTHS) + 2) + "|")
    for operator in arguments.operators:
        grow(operator, max(3, arguments.repetitions // 2))


if __name__ == "__main__":
    main()
