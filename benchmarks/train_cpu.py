"""Tokens a second of a training step on a CPU: RWKV-7 here, a PyTorch GPT of equal size, rwkv_ops' recurrence.

    python benchmarks/train_cpu.py                                    # our row only
    python benchmarks/train_cpu.py --peer-python PATH_TO_A_PYTHON     # beside the peers

The second interpreter belongs to an environment made with

    pip install torch==2.13.0 rwkv_ops==0.11.3 keras jax==0.10.2 flax optax einops

float32, AdamW, gradients clipped. Each row is a process of its own. All of them warm up one after the other; then
their repetitions take turns (A B C A B C ...), each one while the others wait, so that a change of the machine's speed
meets all of them alike. All have pages of 2 MB where `train.py` would take them. Leave the machine alone meanwhile.
Absolute figures do not carry to another machine; the ratios nearly do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers_processes import PeerError, PeerProcess, progress
from rwkv_jax.host import available_cores, huge_page_environment, huge_page_setting, processor
from train_cpu_worker import WARMUP_STEPS, Job

TITLES = {
    "ours": "RWKV-7, this library",
    "rwkv_ops": "the same model, recurrence of rwkv_ops",
    "usual": "RWKV-7 written the usual way, recurrence of rwkv_ops",
    "gpt": "GPT, PyTorch eager",
}
# One sequence a step at T = 4096, for every row: rwkv_ops keeps the state of each token for the backward pass.
BATCH_SIZES = {512: 4, 4096: 1}
RWKV_OPS_ENVIRONMENT = {"KERNEL_BACKEND": "jax", "KERAS_BACKEND": "jax", "KERNEL_TYPE": "native"}
"""Read by rwkv_ops and Keras when they are imported."""
# The share by which rounding may move the losses of the warm-up; without a recurrence they move by ten times that.
LOSS_TOLERANCE = 1e-4


@dataclasses.dataclass
class Result:
    """One row of the table at one shape."""

    row: str
    batch_size: int
    sequence_length: int
    parameters: int = 0
    tokens_per_second: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def median(self) -> float:
        """Tokens a second."""
        return statistics.median(self.tokens_per_second)


def measure(pythons: dict[str, str], jobs: Sequence[Job], repetitions: int) -> list[Result]:
    """Warm every job up, one after the other, then let their repetitions take turns."""
    results = [Result(job.row, job.batch_size, job.sequence_length) for job in jobs]
    with contextlib.ExitStack() as stack:
        # The first clean-up to be asked for is the last to be done: processes end before their folder goes.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Without KERAS_HOME, Keras writes to the user's home.
        environment = RWKV_OPS_ENVIRONMENT | {"KERAS_HOME": str(scratch)} | huge_pages()
        processes: list[PeerProcess] = []
        for job, result in zip(jobs, results, strict=True):
            progress(f"T = {job.sequence_length}: warming up  {TITLES[job.row]}")
            log = scratch / f"{job.row}-{job.sequence_length}.log"
            process = PeerProcess(pythons[job.row], "train_cpu_worker.py", dataclasses.asdict(job), log, environment)
            stack.callback(process.close)
            processes.append(process)
            try:
                ready = process.answer()
                result.parameters, result.versions = ready["parameters"], ready["versions"]
                result.losses = ready["losses"]
            except PeerError as error:
                result.error = str(error)
        for repetition in range(1, repetitions + 1):
            for job, result, process in zip(jobs, results, processes, strict=True):
                if result.error is not None:
                    continue
                try:
                    answer = process.ask({})
                except PeerError as error:
                    result.error = str(error)
                    continue
                result.tokens_per_second.append(job.tokens / answer["seconds"])
                result.losses, result.peak_bytes = answer["losses"], answer["peak_bytes"]
            rates = ", ".join(f"{r.row} {r.tokens_per_second[-1]:,.0f}" for r in results if r.error is None)
            progress(f"T = {jobs[0].sequence_length}: repetition {repetition} of {repetitions}: {rates} tokens/s")
    check(results)
    return results


def huge_pages() -> dict[str, str]:
    """What `train.py` adds to its environment on this machine."""
    environment = {name: value for name, value in os.environ.items() if name == "GLIBC_TUNABLES"}
    return huge_page_environment(environment, huge_page_setting(), platform.libc_ver()) or {}


def check(results: Sequence[Result]) -> None:
    """A row that did not train, or not the same model, is worth nothing: mark it."""
    ours = next((result.losses for result in results if result.row == "ours"), [])
    for result in results:
        if result.error is not None:
            continue
        if not result.losses[-1] < result.losses[0]:
            result.error = f"the loss did not fall: {result.losses[0]:.4f}, then {result.losses[-1]:.4f}"
        elif result.row in ("rwkv_ops", "usual") and ours:
            pairs = zip(result.losses[:WARMUP_STEPS], ours[:WARMUP_STEPS], strict=True)
            difference = max(abs(theirs / our - 1) for theirs, our in pairs)
            if difference > LOSS_TOLERANCE:
                result.error = f"its first losses differ from ours by {difference:.1e}"


def machine() -> dict[str, Any]:
    """What this runs on; nothing that names the machine or its user."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": processor(), "cores": available_cores(), "system": platform.system(), "load_before": load}


def report(results: Sequence[Result], about: dict[str, Any], missing: Sequence[str], arguments: Any) -> str:
    """The table, in Markdown, with what it was measured on above it."""
    found: dict[str, str] = {}
    for result in results:
        found |= {(f"python of {result.row}" if name == "python" else name): v for name, v in result.versions.items()}
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['system']}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(found.items())),
        f"{arguments.num_layers} layers x {arguments.width}, vocabulary {arguments.vocab_size}, float32; medians of "
        f"{arguments.repetitions} interleaved repetitions of {arguments.steps} steps",
    ]
    if about["load_before"] is not None and about["load_before"] > 0.5:
        lines.append(f"The machine was not idle: load {about['load_before']:.1f} before the start.")
    lines += [
        "",
        "| | B x T | parameters | tokens/s (lowest - highest) | ours is | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    medians = {
        result.sequence_length: result.median for result in results if result.row == "ours" and result.error is None
    }
    for result in results:
        cells = [TITLES[result.row], f"{result.batch_size} x {result.sequence_length}"]
        if result.error is not None:
            cells += ["", f"failed: {result.error}", "", ""]
        else:
            ours = medians.get(result.sequence_length)
            rates = result.tokens_per_second
            cells += [
                f"{result.parameters / 1e6:.1f} M",
                f"**{result.median:,.0f}** ({min(rates):,.0f} - {max(rates):,.0f})",
                "" if ours is None or result.row == "ours" else f"{ours / result.median:.2f} x",
                f"{result.peak_bytes / 2**30:.1f} GiB",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\nNot measured: {line}" for line in missing]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    parser = argparse.ArgumentParser(description="Tokens a second of a training step on a CPU, beside peers.")
    parser.add_argument("--peer-python", help="interpreter of an environment that has torch and rwkv_ops")
    parser.add_argument("--rows", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--sequence-lengths", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--batch-size", type=int, help="default: 4, and 1 from 4096 tokens on")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a repetition, after one that is not")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--json", action="store_true", help="print every repetition as JSON instead of a table")
    arguments = parser.parse_args(argv)

    about = machine()
    pythons = {"ours": sys.executable}
    missing: list[str] = []
    for row in arguments.rows:
        if row == "ours":
            continue
        if arguments.peer_python is None:
            missing.append(f"{TITLES[row]} (give --peer-python)")
        else:
            pythons[row] = arguments.peer_python
    rows = [row for row in arguments.rows if row in pythons]
    if not rows:
        parser.error("nothing to measure: the peers need --peer-python")

    results: list[Result] = []
    for length in arguments.sequence_lengths:
        batch_size = arguments.batch_size or BATCH_SIZES.get(length, 4 if length < 4096 else 1)
        shape = (arguments.num_layers, arguments.width, arguments.vocab_size)
        jobs = [Job(row, batch_size, length, arguments.steps, *shape) for row in rows]
        results += measure(pythons, jobs, arguments.repetitions)
    if arguments.json:
        rows_out = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"machine": about, "arguments": describe(arguments), "results": rows_out, "missing": missing}))
    else:
        print(report(results, about, missing, arguments))
    return int(any(result.error is not None for result in results))


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments without the path of an interpreter, which is nobody's business."""
    return {name: value for name, value in vars(arguments).items() if name not in ("peer_python", "json")}


if __name__ == "__main__":
    # As an exception, so that the processes are ended with the driver.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
