"""Loss plot of a run, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_jax.atomic import replace_file
from rwkv_jax.config import CROSS_ENTROPY
from rwkv_jax.figures import encoded, new_figure
from rwkv_jax.run_folder import RUN_FILE, read_run_file
from rwkv_jax.training.reporting.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

PLOT_FILE = "loss.png"

_TRAINING, _HELD_OUT, _RATE, _GRID = "#1f5fa8", "#d1495b", "#5b7f3a", "#d9d9d9"
_NATS = "loss (nats per token)"
_SMOOTHED_SHARE = 0.05
_RATIO_TOLERANCE = 2e-3


def plot_losses(run_dir: Path | str) -> Path:
    """Draw RUN_DIR/metrics.jsonl into RUN_DIR/loss.png and return its path.

    Cross-entropies are in nats per token; a right-hand axis in bits per byte is added if that is a constant multiple.
    Of an alignment, whose steps lose distances, held-out losses are drawn apart. Accuracies of a synthetic task are
    drawn below.
    Raises ValueError if the run has no losses yet.
    """
    run_dir = Path(run_dir)
    metrics = run_dir / METRICS_FILE
    records = read_metrics(metrics) if metrics.exists() else []
    training = [record for record in records if record["kind"] == "train" and "loss" in record]
    held_out = [record for record in records if record["kind"] == "evaluation" and "loss" in record]
    if not any(_number(record, "loss") is not None for record in training + held_out):
        raise ValueError(f"there are no losses to draw in {metrics}; a run writes its first after logging.every steps")

    figure = new_figure(9, 6, dpi=150)
    has_rate = any(_number(record, "learning_rate") is not None for record in training)
    answered = [record for record in held_out if _number(record, "accuracy") is not None]
    drawn = [
        (label, *records)
        for label, *records in _losses_by_unit(_objective(run_dir), training, held_out)
        if any(_number(record, "loss") is not None for each in records for record in each)
    ]
    heights = [4] * len(drawn) + [4] * bool(answered) + [1] * has_rate
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (label, *records) in zip(panels, drawn, strict=False):
        _draw_losses(axes, label, *records)
        _draw_bits_per_byte(axes, *records)
    if answered:
        _draw_accuracies(panels[len(drawn)], answered)
    if has_rate:
        _draw_rates(panels[-1], training)
    panels[-1].set_xlabel("step")
    figure.align_ylabels()

    path = run_dir / PLOT_FILE
    replace_file(path, encoded(figure))
    return path


def _objective(run_dir: Path) -> str:
    """What the run minimizes; next_token if its folder does not say."""
    if not (run_dir / RUN_FILE).exists():
        return "next_token"
    config = read_run_file(run_dir)["config"]
    return str(config.get("application") or config.get("training", {}).get("objective", "next_token"))


def _losses_by_unit(
    objective: str, training: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]
) -> list[tuple[str, Sequence[dict[str, Any]], Sequence[dict[str, Any]]]]:
    """Losses of training and evaluation that share an axis, with its label."""
    if objective == "align":
        return [("distance of mixers' outputs", training, ()), (_NATS, (), held_out)]
    return [(_NATS if objective in CROSS_ENTROPY else f"loss of {objective}", training, held_out)]


def _number(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; steps without a finite value are skipped."""
    points = [(record["step"], value) for record in records if (value := _number(record, name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centered moving average over 5% of the points."""
    reach = round(_SMOOTHED_SHARE * len(values) / 2)
    result: list[float] = []
    for index in range(len(values)):
        half = min(reach, index, len(values) - 1 - index)
        window = values[index - half : index + half + 1]
        result.append(sum(window) / len(window))
    return result


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _draw_losses(
    axes: Axes, label: str, training: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]
) -> None:
    steps, values = _series(training, "loss")
    if values:
        axes.plot(steps, values, color=_TRAINING, alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(values), color=_TRAINING, linewidth=1.8, label=f"training  {values[-1]:.3f}")
    steps, values = _series(held_out, "loss")
    if values:
        last = f"held out  {values[-1]:.3f}"
        axes.plot(steps, values, color=_HELD_OUT, linewidth=1.4, marker="o", markersize=4.5, label=last)
    _style(axes, label)
    axes.legend(frameon=False, loc="upper right")


def _draw_accuracies(axes: Axes, answered: Sequence[dict[str, Any]]) -> None:
    """Accuracy of a synthetic task, and of its parts, with chance."""
    last, suffix = answered[-1], ".accuracy"
    lines = {"accuracy": "accuracy", "whole_accuracy": "whole answers"}
    lines |= {name: name.removesuffix(suffix).replace("_", " ") for name in last if name.endswith(suffix)}
    for name, label in lines.items():
        steps, values = _series(answered, name)
        if values:
            style = "--" if name == "whole_accuracy" else "-"
            axes.plot(steps, values, style, linewidth=1.4, marker="o", markersize=3, label=f"{label}  {values[-1]:.1%}")
    chance = _number(last, "chance")
    if chance is not None:
        axes.axhline(chance, color="black", linestyle=":", linewidth=1, label=f"chance  {chance:.1%}")
    _style(axes, "held-out accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")


def _draw_rates(axes: Axes, training: Sequence[dict[str, Any]]) -> None:
    axes.plot(*_series(training, "learning_rate"), color=_RATE, linewidth=1.5)
    _style(axes, "learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)


def _draw_bits_per_byte(axes: Axes, training: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    """Adds a scale in bits per byte if it fits all points, or one labeled "held out" if it fits only those."""
    for records, label in ([*training, *held_out], "bits per byte"), (held_out, "bits per byte (held out)"):
        ratio = _constant_ratio(records)
        if ratio is not None:
            scale = axes.secondary_yaxis("right", functions=(_times(ratio), _times(1 / ratio)))
            scale.set_ylabel(label)
            scale.spines["right"].set_color(_GRID)
            return


def _times(factor: float) -> Callable[[ArrayLike], ArrayLike]:
    return lambda values: np.asarray(values) * factor


def _constant_ratio(records: Sequence[dict[str, Any]]) -> float | None:
    """Ratio of bits per byte to loss, if it is the same in all records."""
    pairs = [(_number(record, "loss"), _number(record, "bits_per_byte")) for record in records]
    ratios = [bits / loss for loss, bits in pairs if loss is not None and bits is not None and loss > 0]
    if not ratios or max(ratios) - min(ratios) > _RATIO_TOLERANCE * max(ratios):
        return None
    return ratios[-1]
