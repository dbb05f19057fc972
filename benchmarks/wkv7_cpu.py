"""Time, memory and growth with T of the wkv7 implementations: forward, and forward with backward.

    python benchmarks/wkv7_cpu.py

float32. All rows of a table are measured in turns in one run, and medians are printed, so that a change of the
machine's speed meets all of them alike. Absolute figures do not carry to another machine; the ratios nearly do.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from machine import describe_machine
from rwkv_kernels.wkv7 import wkv7_chunked, wkv7_scan

Function = Callable[..., Any]


def make_inputs(batch: int, time_steps: int, heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    """r, log_w, k, v, a, b and a state as a model makes them: unit keys, decays all over their range."""
    keys = jax.random.split(jax.random.key(0), 7)
    shape = (batch, time_steps, heads, head_dim)
    r, k, v, raw_decay, direction, rate = (jax.random.normal(key, shape) for key in keys[:6])
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    log_w = -math.exp(-0.5) * jax.nn.sigmoid(raw_decay - 2)
    state = 0.1 * jax.random.normal(keys[6], (batch, heads, head_dim, head_dim))
    return r, log_w, k, v, -direction, direction * jax.nn.sigmoid(rate), state


def forward_backward(function: Function) -> Function:
    """y and the final state of a call, and their pull-back of themselves to every input."""

    def run(*inputs: jax.Array) -> Any:
        outputs, pull_back = jax.vjp(function, *inputs)
        return outputs, pull_back(outputs)

    return run


def compile_functions(functions: dict[str, Function], inputs: Sequence[jax.Array]) -> dict[str, Any]:
    """Each function compiled for these inputs."""
    return {name: jax.jit(function).lower(*inputs).compile() for name, function in functions.items()}


def medians(compiled: dict[str, Any], inputs: Sequence[jax.Array], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each function; repetitions take turns, after one of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for repetition in range(repetitions + 1):
        for name, function in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def slope(lengths: Sequence[int], times: Sequence[float]) -> float:
    """Exponent of T in a least-squares fit of time ~ T^exponent."""
    x, y = [math.log(t) for t in lengths], [math.log(t) for t in times]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    print(describe_machine())

    rows: dict[str, Function] = {"scan": wkv7_scan}
    rows |= {f"chunked {size}": functools.partial(wkv7_chunked, chunk_size=size) for size in (16, 32, 64)}
    inputs = make_inputs(4, 1024, 8, 64)
    forward = medians(compile_functions(rows, inputs), inputs, arguments.repetitions)
    both_compiled = compile_functions({name: forward_backward(function) for name, function in rows.items()}, inputs)
    both = medians(both_compiled, inputs, arguments.repetitions)
    memory = {name: f.memory_analysis().temp_size_in_bytes / 2**20 for name, f in both_compiled.items()}
    print("\nB4 T1024 H8 N64, float32; the scan's backward is JAX's own")
    print("| implementation | forward ms | forward + backward ms | against scan | temporary MiB | against scan |")
    print("|---|---|---|---|---|---|")
    for name in rows:
        print(
            f"| {name} | {forward[name]:.0f} | {both[name]:.0f} | {both['scan'] / both[name]:.1f}x faster "
            f"| {memory[name]:.0f} | {memory[name] / memory['scan']:.3f} |"
        )

    lengths = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    columns: dict[str, list[float]] = {"forward": [], "forward + backward": []}
    for length in lengths:
        inputs = make_inputs(1, length, 8, 64)
        functions = {"forward": wkv7_chunked, "forward + backward": forward_backward(wkv7_chunked)}
        for name, value in medians(compile_functions(functions, inputs), inputs, arguments.repetitions).items():
            columns[name].append(value)
    print("\nB1 H8 N64, float32, chunked at its default chunk, ms")
    print("| T | " + " | ".join(str(length) for length in lengths) + " | slope |")
    print("|---" * (len(lengths) + 2) + "|")
    for name, times in columns.items():
        print(f"| {name} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {slope(lengths, times):.2f} |")


if __name__ == "__main__":
    main()
