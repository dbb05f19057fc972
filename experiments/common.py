"""What the experiments share: their command line, results.json, models by name, timing, fits, training runs, figures.

An experiment is a folder with a `run.py` that has two pure functions, `measure(sizes) -> results` and
`draw(results, path)`, and hands them to `main`. Nothing of rwkv_jax imports this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.atomic import replace_file
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.models import LanguageModel, abstract_model, model_type

RESULTS, FIGURE = "results.json", "figure.svg"

Name = TypeVar("Name", bound=Hashable)
Results = dict[str, Any]
Claims = dict[str, bool | None]
"""What must hold in the small form, as a sentence each, and whether it does; None if that was not measured."""

SAID: dict[bool | None, str] = {True: "yes", False: "NO", None: "not shown"}
"""How the command says whether a claim holds."""

GENERATIONS: dict[str, dict[str, Any]] = {
    "RWKV-4": {"generation": "4"},
    "RWKV-5": {"generation": "5.2"},
    "RWKV-6": {"generation": "6"},
    "RWKV-7": {"generation": "7"},
}
"""Fields of a ModelConfig by the name in tables."""

TRANSFORMER: dict[str, dict[str, Any]] = {"Transformer": {"architecture": "transformer"}}

MODELS = GENERATIONS | TRANSFORMER

BASELINES: dict[str, dict[str, Any]] = {
    "GLA": {"architecture": "gla"},
    "Mamba-2": {"architecture": "mamba2"},
    "DeltaNet": {"architecture": "deltanet"},
    "Gated DeltaNet": {"architecture": "gated_deltanet"},
    "LSTM": {"architecture": "lstm"},
    "tanh RNN": {"architecture": "rnn"},
}
"""Other mixers in the Transformer's blocks."""

ALL_MODELS = MODELS | BASELINES

NUM_BYTES = 257
"""Vocabulary of the tokenizer `bytes`: end of text, and each byte."""

COLORS = {
    "RWKV-4": "#9a6a00",
    "RWKV-5": "#4f8f3a",
    "RWKV-6": "#2878b5",
    "RWKV-7": "#1f6f5c",
    "RWKV-7, wide": "#00a08a",
    "Transformer": "#b0453a",
    "GLA": "#7a5195",
    "Mamba-2": "#d4699b",
    "DeltaNet": "#5f6c7b",
    "Gated DeltaNet": "#2f3e4e",
    "LSTM": "#e08a1e",
    "tanh RNN": "#111111",
}
MARKERS = dict(zip(COLORS, "osD^v*PXdhp<", strict=True))


# The command.


def main(
    measure: Callable[[Any], Results],
    draw: Callable[[Results, Path], None],
    *,
    small: Any,
    smallest: Any,
    file: str,
    claims: Callable[[Results], Claims] | None = None,
    refusal: Callable[[Results], str | None] | None = None,
) -> None:
    """Runs an experiment from the command line: writes results.json and figure.svg.

    Args:
      small, smallest: sizes, frozen dataclasses; `smallest` is for tests and says nothing about the question.
      file: `__file__` of the experiment.
      claims: what must hold of the small form's results; the status is 1 where it does not.
      refusal: why a run must not replace these results, which are there already; asked unless --out names a folder.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{Path(file).parent.name}.run")
    parser.add_argument("--smallest", action="store_true", help="seconds, as in the tests; says nothing")
    parser.add_argument("--out", type=Path, help="folder of results.json and figure.svg; the experiment's own if none")
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there again")
    given = parser.parse_args()
    if given.smallest and given.out is None:
        parser.error("--smallest: name a folder with --out, or it would replace the results of the small form")
    folder = Path(file).parent if given.out is None else given.out
    folder.mkdir(parents=True, exist_ok=True)
    replaces = given.out is None and not given.draw and (folder / RESULTS).exists()
    if replaces and refusal is not None and (reason := refusal(json.loads((folder / RESULTS).read_text()))):
        parser.error(reason)
    if given.draw:
        replace_file(folder / FIGURE, drawn(draw, json.loads((folder / RESULTS).read_text())))
        return
    results = run(measure, smallest if given.smallest else small)
    held = claims(results) if claims is not None and not given.smallest else {}
    results["claims"] = held
    figure = drawn(draw, results)  # first, so that a failure leaves the old pair
    replace_file(folder / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    replace_file(folder / FIGURE, figure)
    for claim, holds in held.items():
        print(f"{SAID[holds]:9}  {claim}")
    sys.exit(1 if False in held.values() else 0)


def drawn(draw: Callable[[Results, Path], None], results: Results) -> bytes:
    """The figure's file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / FIGURE
        draw(results, path)
        return path.read_bytes()


def all_hold(rows: Iterable[bool | None]) -> bool | None:
    """Whether a claim holds of every row; None if one was not measured, or there is none, and no other contradicts."""
    found = set(rows)
    if False in found:
        return False
    return True if found == {True} else None


def run(measure: Callable[[Any], Results], sizes: Any) -> Results:
    """What `measure` gives, with the machine, the sizes, the load and the seconds that it took; numbers of 6 digits."""
    before, began = os.getloadavg()[0], time.perf_counter()
    found = measure(sizes)
    about = {
        "machine": describe_machine(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(time.perf_counter() - began),
        "sizes": dataclasses.asdict(sizes),
    }
    return json.loads(json.dumps(about | rounded(found)))


def rounded(value: Any) -> Any:
    """A nested value with plain numbers of 6 significant digits; NaN and infinity as None, which JSON has."""
    if isinstance(value, Mapping):
        return {str(name): rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating, jax.Array)):
        number = float(value)
        return float(f"{number:.6g}") if math.isfinite(number) else None
    return value


def progress(text: str) -> None:
    """Tells who waits what goes on."""
    print(text, file=sys.stderr, flush=True)


# Models.


@functools.cache
def _initializer(config: ModelConfig) -> Callable[[jax.Array], LanguageModel]:
    return nnx.jit(lambda key: model_type(config)(config, rngs=nnx.Rngs(params=key)))


def initialized(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model with its official initial values."""
    return _initializer(config)(jax.random.key(seed))


def randomized(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose matrices of zeros are random, of deviation 1 / sqrt(inputs), so that every block does something.

    All else has its official initial values.
    """
    graphdef, params = nnx.split(initialized(config, seed), nnx.Param)
    rng = np.random.default_rng(seed)

    def replaced(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if x.ndim < 2 or min(x.shape[-2:]) == 1 or np.asarray(x).any():
            return x
        is_linear = any(getattr(key, "key", None) == "weight" for key in path)  # [out, in]; low-rank maps are [in, out]
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) / math.sqrt(x.shape[-1 if is_linear else -2]))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(replaced, params))


# Timing and fits.


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call, until its arrays are there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def time_in_turns(functions: Mapping[Name, Callable[[], Any]], repetitions: int) -> dict[Name, list[float]]:
    """Seconds of each function, one call each in turn (A B C A B C ...), after one that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    found: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            found[name].append(seconds_of(function))
    return found


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


class Fit(NamedTuple):
    """y = e^intercept x^slope."""

    slope: float
    intercept: float
    r_squared: float


def fit_power_law(x: Sequence[float] | NDArray, y: Sequence[float] | NDArray) -> Fit:
    """Least squares of log y over log x; a constant through a single point."""
    if len(x) == 1:
        return Fit(0.0, math.log(y[0]), 1.0)
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    slope, intercept = np.polyfit(log_x, log_y, 1)
    rest, spread = log_y - (slope * log_x + intercept), log_y - log_y.mean()
    total = float(spread @ spread)
    return Fit(float(slope), float(intercept), 1 - float(rest @ rest) / total if total else 1.0)


# Training runs.

TINY = "tiny"
"""As a run's source: a few kB of text, for the smallest forms."""


class Run(NamedTuple):
    """What a training run left."""

    steps: list[int]
    losses: list[float]
    """Training losses in nats a token, means since the line before; by `steps`."""
    held_out: list[tuple[int, float]]
    """(step, nats a token) of held-out text."""
    last_held_out: float | None
    """Of all held-out text, at the end."""
    answers: dict[str, float]
    """Of a synthetic task, at the end: accuracy, chance, and those of its parts as `PART.accuracy`."""
    params: Any
    """Nested dict of the parameters at the end."""


def train_config(
    model: ModelConfig,
    *,
    num_steps: int,
    batch_size: int,
    sequence_length: int,
    learning_rate: float,
    seed: int = 0,
    source: str = "python-stdlib",
    held_out: float = 0.0,
    warmup_steps: int | None = None,
    evaluate_every: int | None = None,
    log_every: int = 10,
    tokenizer: str | None = "bytes",
) -> TrainConfig:
    """A run with what experiments leave alone: bytes as tokens, a cosine to a tenth of the rate, no samples."""
    return TrainConfig(
        seed=seed,
        model=model,
        data=DataConfig(source=source, held_out=held_out, tokenizer=tokenizer),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            final_learning_rate=learning_rate / 10,
            warmup_steps=min(20, num_steps // 10) if warmup_steps is None else warmup_steps,
        ),
        training=StepConfig(
            num_steps=num_steps, batch_size=batch_size, sequence_length=sequence_length, reset_at_documents=False
        ),
        evaluation=EvaluationConfig(every=evaluate_every or num_steps, sample_prompts=()),
        checkpoint=CheckpointConfig(every=num_steps, keep=1),
        logging=LoggingConfig(every=min(log_every, num_steps)),
    )


def synthetic_config(
    model: ModelConfig,
    source: str,
    *,
    num_steps: int,
    batch_size: int,
    sequence_length: int,
    learning_rate: float,
    seed: int = 0,
    lengths: tuple[int, ...] = (),
    evaluated_batches: int = 16,
) -> TrainConfig:
    """A run on a synthetic task, evaluated at the end."""
    config = train_config(
        model,
        num_steps=num_steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
        source=source,
        held_out=0.5,  # of other rows than those of training
        tokenizer=None,
    )
    evaluation = dataclasses.replace(config.evaluation, lengths=lengths, batches=evaluated_batches)
    return dataclasses.replace(config, evaluation=evaluation)


def train_run(config: TrainConfig, folder: Path, *, kept: str | None = None) -> Run:
    """Trains in a new folder below `folder`, which keeps corpora and compiled programs for the next run.

    Args:
      kept: name of the run's folder, which is left for others to begin with; without one it is removed.
    """
    from rwkv_jax import train
    from rwkv_jax.training.reporting.metrics import read_metrics

    with contextlib.ExitStack() as stack:
        run_dir = stack.enter_context(tempfile.TemporaryDirectory(dir=folder)) if kept is None else str(folder / kept)
        stack.enter_context(programs_kept_in(folder / "programs", min_seconds=0.2))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        result = train(dataclasses.replace(config, run_dir=run_dir, data=with_source(config.data, folder)))
        records = read_metrics(Path(run_dir) / "metrics.jsonl")
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    return Run(
        steps=[record["step"] for record in training],
        losses=[record["loss"] for record in training],
        held_out=[(record["step"], record["loss"]) for record in evaluations],
        last_held_out=None if result.held_out is None else result.held_out.loss,
        answers={} if result.answers is None else result.answers.record(),
        params=result.state.params,
    )


def with_source(data: DataConfig, folder: Path) -> DataConfig:
    """The data of a run in `folder`, where the made-up text is written if that is its source."""
    data = dataclasses.replace(data, cache_dir=str(folder / "corpora"))
    if data.source != TINY:
        return data
    source = folder / "tiny.txt"
    source.write_text("".join(f"{n} and {n} make {2 * n}.\n" for n in range(200)))
    return dataclasses.replace(data, source=str(source))


def model_of(config: ModelConfig, params: Any) -> LanguageModel:
    """The model with a run's parameters."""
    return nnx.merge(abstract_model(config)[0], params)


# Figures.


def new_figure(num_axes: int = 1, *, width: float = 4.2, height: float = 3.3, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with axes side by side, without pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_axes, height), layout="constrained")
    axes = figure.subplots(1, num_axes, squeeze=False, **options)[0]
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def style(name: str) -> dict[str, Any]:
    """Color, marker and label of a model's line."""
    return {"color": COLORS.get(name), "marker": MARKERS.get(name, "o"), "markersize": 4, "label": name}


def save(figure: Any, path: Path) -> None:
    """Writes the figure; the same numbers give the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "rwkv-jax", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
