"""What a checkpoint's digests cost: their time as a share of a step's, and of the steps between two checkpoints.

    python benchmarks/checkpoint_digests.py

RWKV-7, 6 layers x 512, 8 rows of 512 tokens, float32, on this machine's CPU; medians of several calls, in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import CheckpointConfig, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.digests import digest_tree
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import initial_state, make_train_functions

CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=8192, num_layers=6, width=512),
    training=StepConfig(batch_size=8, sequence_length=512),
)


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call whose results are waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> None:
    """Prints both times' ratio."""
    functions = make_train_functions(CONFIG)
    state = initial_state(functions, 0)
    step = jax.jit(functions.train_step)
    tokens = jax.random.randint(jax.random.key(0), (8, 513), 0, 8192, jnp.int32)
    batch = jax.tree.map(jnp.asarray, make_batch(jax.device_get(tokens), end_of_text=None))
    tree = {name: part for name, part in state._asdict().items() if part is not None}
    calls = {
        "step": lambda: step(state, batch),
        "digests": lambda: digest_tree(tree),
        "copy": lambda: jax.tree.map(jnp.copy, tree),
    }
    for call in calls.values():
        seconds(call)  # compiles
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(found) for name, found in times.items()}
    every, size = CheckpointConfig().every, sum(x.nbytes for x in jax.tree.leaves(tree))
    share = medians["digests"] / (every * medians["step"])
    print(
        f"{describe_machine()}\n"
        f"state of {size / 1e6:.0f} MB: digests take {medians['digests'] / medians['step']:.3f} of a training step, "
        f"{share:.3%} of the {every} steps between two checkpoints (the copy that is saved: "
        f"{medians['copy'] / medians['step']:.3f} of a step)"
    )


if __name__ == "__main__":
    main()
