"""Where a training step's time goes on a CPU: one step is traced, and its operations' times are summed by part.

    python benchmarks/step_profile.py                      # 6 x 512, B4 T512
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/step_profile.py
    PYTHONPATH=OTHER:OTHER/kernels python benchmarks/step_profile.py   # another checkout's code

Times are those of XLA's profiler, added over the threads that run operations; a loop's own time is not counted beside
that of what it runs. Parts come from the names that the compiled program's operations have in its metadata.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = (
    ("wkv operator", re.compile(r"wkv_operator")),
    ("time mixing", re.compile(r"time_mix")),
    ("channel mixing", re.compile(r"channel_mix")),
    ("layers' stacks", re.compile(r"dynamic_(update_)?(slice|index)|broadcast_in_dim$")),
    ("head and loss", re.compile(r"head|loss|logits|log_softmax|embed")),
)
"""Parts by a pattern in an operation's name, the first that fits; the optimizer and whatever else is the rest."""

PRODUCT = re.compile(r"dot_general|conv")


def part_of(name: str) -> str:
    """The part of the step that an operation's metadata name belongs to."""
    return next((part for part, pattern in PARTS if pattern.search(name)), "optimizer and the rest")


def names_of_operations(program: str) -> dict[str, str]:
    """From a compiled program's text: operation -> its name in the source, of a fusion that of the product in it."""
    found: dict[str, str] = {}
    of_computation: dict[str, list[str]] = collections.defaultdict(list)
    calls: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if opens := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = opens[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            name = re.search(r'op_name="([^"]*)"', line)
            found[operation[1]] = name[1] if name else ""
            of_computation[computation].append(found[operation[1]])
            if called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                calls[operation[1]] = called[1]
    for operation, called in calls.items():
        inside = of_computation[called]
        product = next((name for name in inside if PRODUCT.search(name)), None)
        found[operation] = product or found[operation] or next(filter(None, inside), "")
    return found


def seconds_by_part(trace: Mapping[str, Any], names: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """From a profiler's trace: (part, "products" or "the rest") -> seconds."""
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    for event in trace["traceEvents"]:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") != "X" or operation is None or operation.startswith(("while", "call", "conditional")):
            continue
        name = names.get(operation, "")
        kind = "products" if PRODUCT.search(name) else "the rest"
        totals[part_of(name), kind] += event["dur"] / 1e6
    return dict(totals)


def profile(
    num_layers: int, width: int, batch_size: int, length: int, repetitions: int
) -> dict[tuple[str, str], float]:
    """Median seconds by part of some steps, compiled and warmed up before."""
    import jax
    import jax.numpy as jnp

    from rwkv_jax.config import ModelConfig, OptimizerConfig, StepConfig, TrainConfig
    from rwkv_jax.training.batch import Batch
    from rwkv_jax.training.functions import initial_state, make_train_functions
    from train_cpu_worker import Job, batch

    job = Job("ours", batch_size, length, 1, num_layers, width, 8192)
    config = TrainConfig(
        model=ModelConfig(vocab_size=job.vocab_size, num_layers=num_layers, width=width),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0, clip_norm=1.0),
        training=StepConfig(batch_size=batch_size, sequence_length=length),
    )
    trainer = make_train_functions(config)
    state, tokens = initial_state(trainer, 0), Batch(*map(jnp.asarray, batch(job)))
    step = jax.jit(trainer.train_step, donate_argnums=0).lower(state, tokens).compile()
    names, found = names_of_operations(step.as_text() or ""), []
    for repetition in range(repetitions + 2):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, metrics = step(state, tokens)
                jax.block_until_ready((state, metrics))
            if repetition >= 2:
                (path,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
                found.append(seconds_by_part(json.loads(gzip.decompress(path.read_bytes())), names))
    return {key: statistics.median(each.get(key, 0.0) for each in found) for key in set().union(*found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    found = profile(**vars(arguments))
    total = sum(found.values())
    print("| part | products, share | the rest, share |\n|---|---|---|")
    for part in [*(part for part, _ in PARTS), "optimizer and the rest"]:
        shares = (found.get((part, kind), 0) / total for kind in ("products", "the rest"))
        print(f"| {part} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    print(f"\n{total:.2f} s in all, summed over the threads that run operations.")


if __name__ == "__main__":
    main()
