"""Time of a step that trains an adapter against one that trains the whole model, in turn in one process on a CPU.

    PYTHONPATH=. python benchmarks/tuning_step.py                        # 6 x 512, LoRA of rank 16
    PYTHONPATH=. python benchmarks/tuning_step.py --kinds lora miss dora --ranks 8 32

Beside the times stand the operations of all matrix products in the compiled step: a frozen matrix's gradient must not
be computed, that of its input must.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rwkv_jax.config import AdapterKind, DataConfig, ModelConfig, StepConfig, TrainConfig, TuningConfig
from rwkv_jax.host import available_cores, processor
from rwkv_jax.plan.costs import product_flops
from rwkv_jax.plan.program import parse_module
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import initial_state, make_train_functions


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    num_layers: int = 6
    width: int = 512
    rows: int = 2
    time: int = 512
    kinds: tuple[AdapterKind, ...] = ("lora",)
    ranks: tuple[int, ...] = (16,)
    rounds: int = 5
    """Steps of each, in turn."""


def config_of(options: Options, tuning: TuningConfig) -> TrainConfig:
    """A run; of a tuning one the base is never read."""
    base: Any = {"initial_weights": "base", "data": DataConfig(tokenizer="bytes")} if tuning.is_partial else {}
    return TrainConfig(
        model=ModelConfig(num_layers=options.num_layers, width=options.width),
        training=StepConfig(batch_size=options.rows, sequence_length=options.time),
        tuning=tuning,
        **base,
    )


def stepper(config: TrainConfig, params: Any) -> tuple[Callable[[], float], float]:
    """A function that takes a step and returns its seconds, and the operations of the step's matrix products."""
    functions = make_train_functions(config)
    if config.tuning.is_partial:
        draws = np.random.default_rng(1)
        adapters = jax.tree.map(
            lambda x: jnp.asarray(0.01 * draws.standard_normal(x.shape), x.dtype), functions.params["adapter"]
        )
        params = params | {"adapter": adapters}
    state = initial_state(functions, 0, jax.tree.map(jnp.copy, params))
    training = config.training
    rows = np.random.default_rng(0).integers(
        1, config.model.vocab_size, (training.batch_size, training.sequence_length + 1)
    )
    batch = jax.device_put(make_batch(rows.astype(np.int32), end_of_text=0))
    compiled = jax.jit(functions.train_step, donate_argnums=0).lower(state, batch).compile()
    held = [state]

    def step() -> float:
        begin = time.perf_counter()
        held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready((held[0].params, metrics))
        return time.perf_counter() - begin

    return step, sum(product_flops(parse_module(compiled.as_text() or "")).values())


def main() -> None:
    """Prints a table."""
    options = tyro.cli(Options, description=__doc__)
    print(f"{processor()}, {available_cores()} cores, jax {jax.__version__}", file=sys.stderr)
    whole = make_train_functions(config_of(options, TuningConfig()))
    params = jax.jit(whole.draw_params)(jax.random.key(0))
    tunings = {"all": TuningConfig()} | {
        f"{kind} {rank}": TuningConfig(kind, rank=rank) for kind in options.kinds for rank in options.ranks
    }
    steps = {name: stepper(config_of(options, tuning), params) for name, tuning in tunings.items()}
    for step, _ in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, (step, _) in steps.items():
            seconds[name].append(step())
    print("| trained | step ms | against all | GFLOP of products | against all |\n|---|---|---|---|---|")
    for name, (_, flops) in steps.items():
        share = statistics.median(own / of_all for own, of_all in zip(seconds[name], seconds["all"], strict=True))
        row = (f"{1000 * statistics.median(seconds[name]):.0f}", f"{share:.2f}", f"{flops / 1e9:.0f}")
        print(f"| {name} | {' | '.join(row)} | {flops / steps['all'][1]:.2f} |")


if __name__ == "__main__":
    main()
