"""Decoding and reading prompts on a CPU: this library beside llama.cpp and the official `rwkv` package.

    python benchmarks/decode_cpu.py                                            # our rows only
    python benchmarks/decode_cpu.py --rwkv-python PATH --llama-python PATH     # beside the peers

PATH is the interpreter of an environment of the peer's own; how to make it stands in peers_rwkv.py and peers_llama.py.

Every row has the same random weights of an RWKV-7, and is a process of its own. Before anything is timed, its logits
are held against our float32 ones; a float32 row that is off by more than 1e-3 is refused. Then the rows take turns in
each measurement (A B C A B C ...), each one while the others wait, so that a change of the machine's speed meets all of
them alike. Decoding is greedy, with the choice of each token; prompts give the logits after their last token. Leave the
machine alone meanwhile. Absolute figures do not carry to another machine; the ratios nearly do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers_processes import PeerError, PeerProcess, progress
from peers_protocol import Job, Request
from rwkv_jax.bench.random_model import RandomTensors
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.host import available_cores
from rwkv_jax.weights.ggml.writing import write_gguf
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.sources import open_weights

CHECKED_TOKENS = 32
FLOAT32_TOLERANCE = 1e-3
"""By which a float32 row's logits may differ from ours, whose standard deviation is about 1."""
QUANTIZED_TOLERANCE = 0.5
"""By which those of a row in fewer bits may, as a share of their standard deviation; for another model it is 1.4."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    title: str
    peer: str
    """A key of PROGRAMS."""
    precision: str = "float32"
    max_batch_size: int = 8


PROGRAMS = {"ours": "peers_ours.py", "rwkv": "peers_rwkv.py", "llama": "peers_llama.py"}

ROWS = {
    "ours": Row("this library, float32", "ours"),
    "ours_bfloat16": Row("this library, bfloat16", "ours", "bfloat16"),
    "ours_int8": Row("this library, int8", "ours", "int8"),
    "ours_int4": Row("this library, int4", "ours", "int4"),
    "rwkv": Row("rwkv, float32", "rwkv", max_batch_size=1),
    "llama": Row("llama.cpp, f32", "llama"),
    "llama_bf16": Row("llama.cpp, bf16", "llama", "bfloat16"),
    "llama_q8_0": Row("llama.cpp, q8_0", "llama", "q8_0"),
    "llama_q4_0": Row("llama.cpp, q4_0", "llama", "q4_0"),
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A column of the table."""

    task: str
    """`decode` or `prefill`."""
    batch_size: int
    num_tokens: int
    """To decode in each text; of the prompt."""

    @property
    def title(self) -> str:
        """What stands above the column."""
        if self.task == "prefill":
            return f"prompt of {self.num_tokens}"
        return f"decode, batch {self.batch_size}"

    @property
    def tokens(self) -> int:
        """Tokens of one repetition."""
        return self.batch_size * self.num_tokens


DECODE, DECODE_8 = Measurement("decode", 1, 32), Measurement("decode", 8, 32)
PROMPT_512, PROMPT_2048 = Measurement("prefill", 1, 512), Measurement("prefill", 1, 2048)
MEASUREMENTS = (DECODE, DECODE_8, PROMPT_512, PROMPT_2048)


@dataclasses.dataclass
class Result:
    """What has been found of one row."""

    name: str
    rates: dict[Measurement, list[float]] = dataclasses.field(default_factory=dict)
    """Tokens a second of each repetition."""
    logits_error: float = 0.0
    """Root mean square of the difference to our float32 logits, as a share of their standard deviation."""
    peak_bytes: int = 0
    """Most resident memory that the process has had."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None


def check(found: Mapping[str, NDArray], reference: Mapping[str, NDArray], precision: str) -> tuple[float, str | None]:
    """Whether a row is the same model as our float32 one.

    Args:
      found, reference: what `peers_protocol.outputs` gives; the row's may lack `batch`.

    Returns:
      The error of its logits (see Result), and what is wrong, if anything is.
    """
    error = 0.0
    for name in ("prefill", "decode", "batch"):
        if name not in found:
            continue
        difference = found[name] - reference[name]
        spread = float(reference[name].std())
        if not (np.isfinite(difference).all() and spread > 0.1):
            return float("nan"), f"its logits or ours mean nothing ({name})"
        error = max(error, float(np.sqrt(np.mean(np.square(difference)))) / spread)
        largest = float(np.abs(difference).max())
        if precision == "float32" and largest > FLOAT32_TOLERANCE:
            return error, f"its logits differ from ours by {largest:.1e} ({name})"
    if error > QUANTIZED_TOLERANCE:
        return error, f"its logits are {error:.0%} off ours"
    if not np.array_equal(found["greedy"], found["greedy_by_reading"]):
        return error, "decoding chooses other tokens than reading one after the other"
    return error, None


@dataclasses.dataclass(frozen=True)
class Bench:
    """Open rows and where their files lie."""

    results: list[Result]
    processes: list[PeerProcess]
    tokens: Path
    """.npy, token ids for prompts and checks."""

    def ask(self, index: int, request: Request) -> dict[str, Any]:
        """What row `index` answers; nothing, with the error noted, if it has failed."""
        result = self.results[index]
        if result.error is None:
            try:
                answer = self.processes[index].ask(dataclasses.asdict(request))
            except PeerError as error:
                result.error = str(error)
            else:
                result.peak_bytes = answer["peak_bytes"]
                return answer
        return {}

    def check_all(self, scratch: Path) -> None:
        """Hold every row's logits against those of the first; a row that is another model is marked as failed."""
        reference: dict[str, NDArray] = {}
        for index, result in enumerate(self.results):
            row = ROWS[result.name]
            progress(f"checking {row.title}")
            output = scratch / f"{result.name}.npz"
            self.ask(index, Request("check", str(self.tokens), row.max_batch_size, CHECKED_TOKENS, str(output)))
            if result.error is None:
                with np.load(output) as file:
                    found = dict(file)
                reference = reference or found
                result.logits_error, result.error = check(found, reference, row.precision)
            if not reference:
                raise SystemExit(f"{row.title}, which the others are held against, {result.error}")

    def measure(self, measurement: Measurement, repetitions: int) -> None:
        """One column: a repetition to warm up, then those that count, in turns."""
        request = Request(measurement.task, str(self.tokens), measurement.batch_size, measurement.num_tokens)
        taking_part = [
            index for index, r in enumerate(self.results) if ROWS[r.name].max_batch_size >= measurement.batch_size
        ]
        for repetition, index in itertools.product(range(repetitions + 1), taking_part):
            result = self.results[index]
            answer = self.ask(index, request)
            if answer and repetition:
                result.rates.setdefault(measurement, []).append(measurement.tokens / answer["seconds"])
        rates = ", ".join(f"{r.name} {rate_of(r, measurement):,.1f}" for r in self.results if has(r, measurement))
        progress(f"{measurement.title}: {rates} tokens/s")


def has(result: Result, measurement: Measurement) -> bool:
    """Whether a row has been measured."""
    return result.error is None and bool(result.rates.get(measurement))


def rate_of(result: Result, measurement: Measurement) -> float:
    """Median of tokens a second."""
    return statistics.median(result.rates[measurement])


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of a quotient: both were measured in each."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A ratio of two rates, and what it is to be."""

    text: str
    of: tuple[str, Measurement]
    to: tuple[str, Measurement]
    at_most: float | None = None
    at_least: float | None = None

    def line(self, value: float) -> str:
        """The ratio, and whether it is what it is to be."""
        line = f"{self.text}: {value:.2f}"
        if self.at_most is not None:
            line += f" (at most {self.at_most}: {'yes' if value <= self.at_most else 'NO'})"
        if self.at_least is not None:
            line += f" (at least {self.at_least}: {'yes' if value >= self.at_least else 'NO'})"
        return line


FIGURES = (
    Figure("decode, float32: our time against llama.cpp's f32", ("llama", DECODE), ("ours", DECODE), at_most=1.1),
    Figure("decode, float32: our time against rwkv's", ("rwkv", DECODE), ("ours", DECODE)),
    Figure("decode: our int8 is faster than our float32 by", ("ours_int8", DECODE), ("ours", DECODE), at_least=1.6),
    Figure("decode: our int4 is faster than our float32 by", ("ours_int4", DECODE), ("ours", DECODE)),
    Figure("decode: our int8's time against llama.cpp's q8_0", ("llama_q8_0", DECODE), ("ours_int8", DECODE)),
    Figure("decode: our int4's time against llama.cpp's q4_0", ("llama_q4_0", DECODE), ("ours_int4", DECODE)),
    Figure("decode, float32: tokens/s of 8 texts against one", ("ours", DECODE_8), ("ours", DECODE), at_least=3),
    Figure(
        "prompt of 512: our tokens/s against llama.cpp's f32", ("ours", PROMPT_512), ("llama", PROMPT_512), at_least=1.4
    ),
    Figure("prompt of 2048: our tokens/s against llama.cpp's f32", ("ours", PROMPT_2048), ("llama", PROMPT_2048)),
    Figure("prompt of 2048: our tokens/s against decoding", ("ours", PROMPT_2048), ("ours", DECODE), at_least=10),
)


def figures(results: Sequence[Result]) -> list[str]:
    """The ratios that say how good ours is, for what has been measured."""
    rates = {(r.name, m): r.rates[m] for r in results for m in r.rates if r.error is None}
    return [
        figure.line(ratio(rates[figure.of], rates[figure.to]))
        for figure in FIGURES
        if figure.of in rates and figure.to in rates
    ]


def report(results: Sequence[Result], measurements: Sequence[Measurement], about: str, missing: Sequence[str]) -> str:
    """The table, in Markdown, with what it was measured on above it and ratios below."""
    versions = {name: version for result in results for name, version in result.versions.items()}
    titles = [f"{m.title}, {'ms a token' if m == DECODE else 'tokens/s'}" for m in measurements]
    lines = [
        about + "; " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "",
        "| | " + " | ".join(titles) + " | error of logits | peak memory |",
        "|---" * (len(measurements) + 3) + "|",
    ]
    for result in results:
        cells = [ROWS[result.name].title]
        for measurement in measurements:
            if not has(result, measurement):
                cells.append("")
                continue
            rates = result.rates[measurement]
            if measurement == DECODE:
                times = [1e3 / rate for rate in rates]
                cells.append(f"**{statistics.median(times):.1f}** ({min(times):.1f} - {max(times):.1f})")
            else:
                cells.append(f"**{statistics.median(rates):,.0f}** ({min(rates):,.0f} - {max(rates):,.0f})")
        if result.error is None:
            cells += [f"{result.logits_error:.1e}", f"{result.peak_bytes / 2**30:.1f} GiB"]
        else:
            cells += [f"failed: {result.error}", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *figures(results), *(f"Not measured: {line}" for line in missing)]
    return "\n".join(lines)


def write_for_llama(weights: Path, config: ModelConfig) -> None:
    """The tensors of a .pth once more as the GGUF beside it, without a tokenizer, for peers_llama.py."""
    write_gguf(weights.with_suffix(".gguf"), open_weights(weights).tensors, config, None, None)


def run(
    rows: Sequence[str],
    pythons: Mapping[str, str],
    config: ModelConfig,
    measurements: Sequence[Measurement],
    repetitions: int,
    folder: Path | None,
) -> list[Result]:
    """Write the weights, open every row, check all of them, then measure.

    Args:
      rows: keys of ROWS, ours in float32 first.
      pythons: the interpreter of each peer.
      folder: for the weights in every form, some 3 GB for 12 x 768; None is a temporary one.
    """
    with contextlib.ExitStack() as stack:
        # The first clean-up to be asked for is the last to be done: processes end before their folder goes.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        progress("writing weights")
        write_torch_file(scratch / "weights.pth", RandomTensors(config))
        if "llama" in pythons:
            write_for_llama(scratch / "weights.pth", config)
        max_length = max(measurement.num_tokens for measurement in measurements)
        np.save(scratch / "tokens.npy", np.random.default_rng(0).integers(0, config.vocab_size, max_length, np.int32))
        bench = Bench([Result(name) for name in rows], [], scratch / "tokens.npy")
        threads = available_cores()
        for result in bench.results:
            row = ROWS[result.name]
            progress(f"opening {row.title}")
            job = Job(
                str(scratch / "weights.pth"), row.precision, row.max_batch_size, max_length, threads, str(scratch)
            )
            process = PeerProcess(
                pythons[row.peer],
                PROGRAMS[row.peer],
                dataclasses.asdict(job),
                scratch / f"{result.name}.log",
                {"OMP_NUM_THREADS": str(threads)},
            )
            stack.callback(process.close)
            bench.processes.append(process)
            try:
                result.versions = process.answer()["versions"]
            except PeerError as error:
                result.error = str(error)
        bench.check_all(scratch)
        for measurement in measurements:
            bench.measure(measurement, repetitions)
        return bench.results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rwkv-python", help="interpreter of an environment that has the rwkv package")
    parser.add_argument("--llama-python", help="interpreter of an environment that has llama-cpp-python")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="ours in float32 always runs")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--scratch", type=Path, help="folder for the weights' files, some 3 GB")
    parser.add_argument("--json", type=Path, help="also write every repetition to this new file")
    arguments = parser.parse_args(argv)
    if arguments.json is not None and (problem := refuses_output(arguments.json)):
        parser.error(f"--json: {problem}")
    for peer in ("rwkv", "llama"):
        python = getattr(arguments, f"{peer}_python")
        if python is not None and shutil.which(python) is None:
            parser.error(
                f"--{peer}-python: {python} is no program that can be run; peers_{peer}.py says how to make its "
                "environment"
            )

    given = {"ours": sys.executable, "rwkv": arguments.rwkv_python, "llama": arguments.llama_python}
    pythons = {peer: python for peer, python in given.items() if python is not None}
    rows = [name for name in ROWS if name == "ours" or (name in arguments.rows and ROWS[name].peer in pythons)]
    missing = [
        f"{ROWS[name].title} (not installed: give --{ROWS[name].peer}-python)"
        for name in arguments.rows
        if ROWS[name].peer not in pythons
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    config = ModelConfig(vocab_size=arguments.vocab_size, num_layers=arguments.num_layers, width=arguments.width)
    results = run(rows, pythons, config, MEASUREMENTS, arguments.repetitions, arguments.scratch)
    about = (
        f"{describe_machine()}; RWKV-7, {config.num_layers} x {config.width}, vocabulary {config.vocab_size}; medians "
        f"(lowest - highest) of {arguments.repetitions} repetitions in turn"
        + (f"; the machine was not idle: load {load:.1f} before the start" if load > 0.5 else "")
    )
    print(report(results, MEASUREMENTS, about, missing), flush=True)  # first, whatever becomes of the file
    if arguments.json is not None:
        with arguments.json.open("x", encoding="utf-8") as file:
            file.write(as_json(results, about, missing))
    return int(any(result.error is not None for result in results))


def refuses_output(path: Path) -> str | None:
    """Why a new file cannot be written there, if it cannot."""
    if path.exists():
        return f"{path} exists, and nothing is overwritten; name another file"
    if not path.parent.is_dir():
        return f"{path.parent} is no folder; make it, or name another file"
    if not os.access(path.parent, os.W_OK):
        return f"{path.parent} cannot be written to; name another file"
    return None


def as_json(results: Sequence[Result], about: str, missing: Sequence[str]) -> str:
    """Every repetition."""
    rows = [
        dataclasses.asdict(dataclasses.replace(result, rates={}))
        | {"tokens_per_second": {measurement.title: rates for measurement, rates in result.rates.items()}}
        for result in results
    ]
    return json.dumps({"about": about, "results": rows, "not_measured": list(missing)}, indent=1)


if __name__ == "__main__":
    # As an exception, so that the processes are ended with the driver.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
