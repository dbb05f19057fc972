"""A token of models with tables by token: on the device, also folded, and in the host's memory.

`python benchmarks/host_tables.py --help`; places take turns. Prints Markdown, which is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
from flax import nnx

from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.models.decoding import fetched_bytes, unstacked, with_host_tables
from rwkv_jax.models.folded_tables import with_folded_tables


def seconds_a_step(models: list[Any], batch: int, steps: int) -> list[list[float]]:
    """Of single tokens by each model in turn, each with ids of its own, after two that compile."""
    split = [nnx.split(model, nnx.Param) for model in models]
    programs = [
        jax.jit(lambda params, tokens, state, own=own: nnx.merge(own, params)(tokens, state), donate_argnums=2)
        for own, _ in split
    ]
    states, seconds = [model.initial_state(batch) for model in models], [[] for _ in models]
    for step in range(steps + 2):
        tokens = jax.random.randint(jax.random.key(step), (batch, 1), 0, models[0].config.vocab_size)
        for i, (program, (_, params)) in enumerate(zip(programs, split, strict=True)):
            begin = time.perf_counter()
            _, states[i] = jax.block_until_ready(program(params, tokens, states[i]))
            seconds[i].append(time.perf_counter() - begin)
    return [own[2:] for own in seconds]


def main() -> None:
    """Prints a line for each model, batch and place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}\n")
    print("| model | tables | MiB on the device | texts | ms a step, median (least) | KiB fetched a step |")
    print("|---|---|---|---|---|---|")
    for generation in ("7a", "7b", "8-rc00"):
        sizes = {"num_layers": given.num_layers, "width": given.width, "vocab_size": given.vocab_size}
        model = unstacked(random_model(ModelConfig(generation, dtype="float32", **sizes)))
        models = {"device": model, "host": with_host_tables(model)}
        if model.config.spec.table_maps:
            models["folded"] = with_folded_tables(model)
        for batch in (1, 8):
            timed = seconds_a_step(list(models.values()), batch, given.steps)
            for (place, own), seconds in zip(models.items(), timed, strict=True):
                size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(own, nnx.Param)))
                print(
                    f"| {own.config.title} | {place} | {size / 2**20:,.0f} | {batch} | "
                    f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f}) | "
                    f"{batch * fetched_bytes(own) / 1024:,.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
