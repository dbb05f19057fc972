"""Does RWKV-7 forecast real series as well as DLinear and a Transformer, and better than the season before?

    python -m experiments.forecasting.run          # needs statsmodels: pip install 'rwkv-jax[apps]'

Four series that statsmodels ships, split by time. All models read the same windows, normalized in the same way,
train with the same recipe, and are judged on the part after the validation part, by the evaluation best on that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from rwkv_jax.applications.series.config import Series, SeriesConfig
from rwkv_jax.applications.series.data import SEASONS, horizons_of, read_table, seasonal_naive, windows
from rwkv_jax.applications.series.model import SeriesApplication, forecast_losses
from rwkv_jax.cli.program_cache import programs_kept_in
from rwkv_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
)

NAIVE, DLINEAR = "seasonal naive", "DLinear"
COLORS = {"RWKV-7": "#1f6f5c", "Transformer": "#b0453a", DLINEAR: "#2878b5", NAIVE: "#777777"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A series, and how it is cut."""

    source: str
    horizon: int
    num_patches: int
    patch: int
    stride: int


TASKS = (
    Task("sunspots", 11, 9, 12, 4),
    Task("elnino", 24, 10, 12, 4),
    Task("co2", 52, 14, 52, 8),
    Task("macrodata", 8, 13, 8, 2),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run."""

    tasks: tuple[Task, ...] = TASKS
    models: tuple[str, ...] = ("RWKV-7", "Transformer", DLINEAR)
    num_layers: int = 2
    width: int = 32
    head_dim: int = 16
    num_steps: int = 200
    evaluate_every: int = 25
    batch_size: int = 32
    learning_rate: float = 2e-3
    seeds: tuple[int, ...] = (0,)


SMALL = Sizes()
SMALLEST = Sizes((Task("waves", 12, 6, 4, 4),), ("RWKV-7", DLINEAR), 2, 16, 8, 2, 2, seeds=(0,))


def config_of(name: str, task: Task, sizes: Sizes, seed: int = 0) -> SeriesConfig:
    """A model's run; the layers have equally many parameters, DLinear two numbers for each pair of steps."""
    model = ModelConfig(vocab_size=1, num_layers=sizes.num_layers, width=sizes.width, head_dim=sizes.head_dim)
    if name == "Transformer":
        model = model.of_equal_size("transformer", context_length=task.num_patches)
    return SeriesConfig(
        seed=seed,
        model=model,
        series=Series(
            source=task.source,
            kind="dlinear" if name == DLINEAR else "layers",
            horizon=task.horizon,
            patch=task.patch,
            stride=task.stride,
        ),
        optimizer=OptimizerConfig(
            learning_rate=sizes.learning_rate,
            final_learning_rate=sizes.learning_rate / 20,
            warmup_steps=min(20, sizes.num_steps // 2),
            weight_decay=0.1,
        ),
        training=StepConfig(batch_size=sizes.batch_size, sequence_length=task.num_patches, num_steps=sizes.num_steps),
        evaluation=EvaluationConfig(every=sizes.evaluate_every, sample_prompts=()),
        checkpoint=CheckpointConfig(every=sizes.num_steps, keep=1),
        logging=LoggingConfig(every=min(25, sizes.num_steps)),
    )


def naive_metrics(config: SeriesConfig) -> dict[str, float]:
    """Errors of the season before, on the same windows."""
    batch = windows(read_table(config.series.source), config, "test").arrays
    forecast = seasonal_naive(batch.past, config.series.horizon, SEASONS[config.series.source])
    metrics = forecast_losses(jnp.asarray(forecast), batch).metrics
    return {name: float(jnp.mean(values)) for name, values in metrics.items()}


def trained_metrics(config: SeriesConfig, folder: Path) -> tuple[dict[str, float], int]:
    """Errors at the best evaluation, and the number of parameters."""
    from rwkv_jax.training.application import load_application
    from rwkv_jax.training.loop import train

    with tempfile.TemporaryDirectory(dir=folder) as run_dir, contextlib.redirect_stdout(io.StringIO()):
        params = train(dataclasses.replace(config, run_dir=f"{run_dir}/run")).state.params
        application, model = load_application(f"{run_dir}/run", "best")
        found = cast("SeriesApplication", application).test_metrics(model)
    return found, sum(int(x.size) for x in jax.tree.leaves(params))


def measure(sizes: Sizes) -> common.Results:
    """Errors of each model on each series, means over seeds."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, programs_kept_in(Path(folder) / "programs", min_seconds=0.2):
        for task in sizes.tasks:
            rows: dict[str, Any] = {NAIVE: naive_metrics(config_of(DLINEAR, task, sizes))}
            for name in sizes.models:
                runs = [trained_metrics(config_of(name, task, sizes, seed), Path(folder)) for seed in sizes.seeds]
                rows[name] = {key: float(np.mean([run[key] for run, _ in runs])) for key in runs[0][0]}
                rows[name]["parameters"] = runs[0][1]
                common.progress(f"{task.source}, {name}: {rows[name]}")
            found[task.source] = {"horizons": [*horizons_of(task.horizon), task.horizon], "models": rows}
    return {"series": found}


def claims(results: common.Results) -> common.Claims:
    """What was to be shown, set before anything was run."""
    found: common.Claims = {}
    for source, row in results["series"].items():
        models = row["models"]
        for measured in ("mse", "mae"):
            keys = [f"{measured}_{horizon}" for horizon in row["horizons"]]
            ours = models["RWKV-7"]
            found[f"{source}: RWKV-7's {measured.upper()} is below that of the season before at every horizon"] = all(
                ours[key] < models[NAIVE][key] for key in keys
            )
            others = [name for name in models if name not in ("RWKV-7", NAIVE)]
            found[f"{source}: RWKV-7's {measured.upper()} is within 5% of the best baseline at every horizon"] = all(
                ours[key] <= 1.05 * min(models[name][key] for name in others) for key in keys
            )
    return found


def draw(results: common.Results, path: Path) -> None:
    """Squared errors by horizon."""
    figure, axes = common.new_figure(len(results["series"]), width=3.0)
    for panel, (source, row) in zip(axes, results["series"].items(), strict=True):
        for name, errors in row["models"].items():
            values = [errors[f"mse_{horizon}"] for horizon in row["horizons"]]
            panel.plot(row["horizons"], values, color=COLORS[name], marker="o", markersize=4, label=name)
        panel.set(xlabel="steps ahead, up to", title=source, yscale="log")
        panel.set_xticks(row["horizons"], map(str, row["horizons"]))
    axes[0].set_ylabel("mean squared error, in variances")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
