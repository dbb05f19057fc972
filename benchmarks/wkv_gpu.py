"""What a GPU has to say of the kernels, in one run of at most ten minutes, the most important first.

    PYTHONPATH=. python benchmarks/wkv_gpu.py --out FOLDER        # FOLDER/wkv_gpu.json, and tables
    PYTHONPATH=. python benchmarks/wkv_gpu.py --parts correctness --budget 120

1. correctness: every kernel of every operator, and of `wkv7_step` and `wkv7_output`, against the definition in
   float64, with gradients, packed rows, lengths, in each precision. The exit status is 1 if one is wrong or fails, and
   on a GPU also if there was no time for one.
2. operators: milliseconds forward, and forward with backward, at three shapes, with errors on the first row and head
   at that size; how much longer it takes than moving arguments, results and gradients once, at the bandwidth that a
   copy reaches in this run; beside flash-linear-attention (chunk_rwkv7, chunk_rwkv6, fused_recurrent_rwkv4).
3. training: a step of RWKV-7 0.1B, as many rows as a device of the recipe has, with each implementation.
4. decoding: `wkv7_step` by each implementation; tokens/s of an engine of RWKV-7 1.5B in bfloat16, 1 and 64 texts.

Programs of a part are compiled side by side before any of it is timed. Each part has a share of the budget; what does
not fit is skipped, and named. Without a GPU all parts run at small sizes by what the CPU has, so that the script
itself stays tested, and the kernels are skipped with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory of its own

import jax

import gpu_models
import gpu_operators
import rwkv_kernels
from gpu_items import OUT_OF_TIME, Item, Record, run_items
from gpu_operators import Settings
from rwkv_jax.atomic import replace_file
from rwkv_jax.cli.machine import describe_machine
from rwkv_kernels.testing.cases import Shape

PARTS: dict[str, tuple[Callable[[Settings], list[Item]], float]] = {
    "correctness": (gpu_operators.correctness, 0.35),
    "operators": (gpu_operators.timings, 0.5),
    "training": (gpu_models.training, 0.5),
    "decoding": (gpu_models.decoding, 1.0),
}
"""In order; with the share that each may take of the time that is left."""

OPERATORS = ("wkv7", "wkv6", "wkv5", "wkv4", *rwkv_kernels.PARTS)

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "triton", "flash-linear-attention")


def measure(parts: Sequence[str], settings: Settings, budget: float, report: Callable[[Record], None]) -> list[Record]:
    """Records of all items of these parts, each reported as soon as it is there."""
    deadline = time.monotonic() + budget
    records = []
    for part in parts:
        items, share = PARTS[part]
        for record in run_items(items(settings), share * max(0.0, deadline - time.monotonic())):
            records.append(record)
            report(record)
    return records


def is_wrong(record: Record) -> bool:
    """Whether a kernel was checked, and is not right."""
    return record.get("right") is False or (record["part"] == "correctness" and "failed" in record)


def is_unchecked(record: Record) -> bool:
    """Whether there was no time to check a kernel."""
    return record["part"] == "correctness" and record.get("skipped") in OUT_OF_TIME


def complaints(records: Sequence[Record], on_gpu: bool) -> list[str]:
    """Lines that name what is wrong, and on a GPU what was not checked; none if all is well."""
    wrong = [record["name"] for record in records if is_wrong(record)]
    unchecked = [record["name"] for record in records if on_gpu and is_unchecked(record)]
    lines = [f"WRONG, or failing: {'; '.join(wrong)}"] if wrong else []
    if unchecked:
        lines.append(f"NOT CHECKED, for want of time; give a larger --budget: {'; '.join(unchecked)}")
    return lines


def line(record: Record) -> str:
    """A record in a line."""
    found = {name: x for name, x in record.items() if name not in ("part", "name")}
    shown = (f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in found.items())
    return f"{record['part']:<12} {record['name']:<62} {', '.join(shown)}"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_shape(text: str) -> Shape:
    """BxTxHxN with values as long as keys."""
    batch, time_steps, heads, key_dim = map(int, text.split("x"))
    return Shape(batch, time_steps, heads, key_dim, key_dim)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a kernel is wrong, fails where that is checked, or on a GPU was not checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for wkv_gpu.json; made if it is not there")
    parser.add_argument("--budget", type=float, default=540, help="seconds, which one item may exceed")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--operators", nargs="+", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="BxTxHxN, such as 8x4096x64x64")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=10)
    given = parser.parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu:
        print("no GPU here: kernels are skipped, the rest runs at small sizes")
    shapes = tuple(given.shapes or (gpu_operators.SHAPES if on_gpu else gpu_operators.SMALL_SHAPES))
    settings = Settings(tuple(given.operators), shapes, tuple(given.dtypes), given.repetitions, on_gpu)
    heading = {"machine": describe_machine(), "versions": versions(), "bytes_a_second": gpu_operators.bandwidth()}
    print(f"{heading['machine']}; a copy moves {heading['bytes_a_second'] / 1e9:.0f} GB/s", flush=True)
    records: list[Record] = []

    def report(record: Record) -> None:
        records.append(record)
        print(line(record), flush=True)
        if given.out is not None:  # each time: whoever waits no longer has what was found
            given.out.mkdir(parents=True, exist_ok=True)
            replace_file(given.out / "wkv_gpu.json", json.dumps(heading | {"records": records}, indent=1).encode())

    measure(given.parts, settings, given.budget, report)
    found = complaints(records, on_gpu)
    for complaint in found:
        print(complaint)
    return 1 if found else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # what is still being compiled would be waited for
