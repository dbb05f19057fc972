"""Each mixer with a recipe of its own: who is ahead, and does it last?

    python -m experiments.baselines.run

For each model a learning rate is chosen among some, then a warm-up, by the held-out loss of short runs. With its own
recipe each model then trains longer, and the held-out loss is drawn over the run: where two curves cross, who is ahead
depends on the length. All models have the same blocks, width and depth, and the parameters of RWKV-7 by the width of
their feed-forward part.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig, TrainConfig

REFERENCE = "RWKV-7"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models and runs."""

    models: tuple[str, ...] = tuple(common.ALL_MODELS)
    num_layers: int = 2
    width: int = 64
    head_dim: int = 32
    batch_size: int = 8
    sequence_length: int = 128
    rates: tuple[float, ...] = (1e-3, 2.5e-3, 6e-3)
    warmups: tuple[int, ...] = (20, 100)
    """The first one is that of the runs that choose the rate."""
    sweep_steps: int = 200
    num_steps: int = 1500
    evaluate_every: int = 100
    held_out: float = 0.01
    source: str = "python-stdlib"


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    width=8,
    head_dim=4,
    batch_size=2,
    sequence_length=8,
    rates=(1e-3,),
    warmups=(1,),
    sweep_steps=4,
    num_steps=4,
    evaluate_every=2,
    held_out=0.3,
    source=common.TINY,
)


def config_of(name: str, sizes: Sizes, num_steps: int, rate: float, warmup: int) -> TrainConfig:
    """A run of a model by a recipe."""
    shape: dict[str, Any] = {"vocab_size": common.NUM_BYTES, "num_layers": sizes.num_layers}
    shape |= {"width": sizes.width, "head_dim": sizes.head_dim}
    target = ModelConfig(**common.ALL_MODELS[REFERENCE], **shape).num_parameters()
    return common.train_config(
        ModelConfig(**common.ALL_MODELS[name], **shape).with_num_parameters(target, multiple=1),
        num_steps=num_steps,
        batch_size=sizes.batch_size,
        sequence_length=sizes.sequence_length,
        learning_rate=rate,
        warmup_steps=min(warmup, num_steps - 1),
        evaluate_every=sizes.evaluate_every,
        source=sizes.source,
        held_out=sizes.held_out,
    )


def measure(sizes: Sizes) -> common.Results:
    """Held-out loss of every recipe tried, the one chosen, and the curve with it, nats a byte."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in sizes.models:
            tried: dict[tuple[float, int], float] = {}

            def loss(rate: float, warmup: int, name: str = name, tried: dict = tried) -> float:
                if (rate, warmup) not in tried:
                    run = common.train_run(config_of(name, sizes, sizes.sweep_steps, rate, warmup), folder)
                    tried[rate, warmup] = run.last_held_out or float("nan")
                    common.progress(f"{name}, rate {rate:g}, warm-up {warmup}: {tried[rate, warmup]:.4f}")
                return tried[rate, warmup]

            rate = min(sizes.rates, key=functools.partial(loss, warmup=sizes.warmups[0]))
            warmup = min(sizes.warmups, key=functools.partial(loss, rate))
            run = common.train_run(config_of(name, sizes, sizes.num_steps, rate, warmup), folder)
            common.progress(f"{name}, {sizes.num_steps} steps: {run.last_held_out}")
            rows[name] = {
                "recipe": {"learning_rate": rate, "warmup_steps": warmup},
                "tried": [{"learning_rate": r, "warmup_steps": w, "loss": x} for (r, w), x in tried.items()],
                "steps": [step for step, _ in run.held_out],
                "loss": [value for _, value in run.held_out],
                "last_loss": run.last_held_out,
            }
    return {"rows": rows, "crossings": crossings(rows)}


def crossings(rows: dict[str, Any]) -> dict[str, list[int]]:
    """By other model, the steps after which it and the reference have changed places."""
    if REFERENCE not in rows:
        return {}
    found = {}
    for name in (name for name in rows if name != REFERENCE):
        ahead = [own < other for own, other in zip(rows[REFERENCE]["loss"], rows[name]["loss"], strict=True)]
        steps = rows[name]["steps"]
        found[name] = [steps[index] for index in range(1, len(ahead)) if ahead[index] != ahead[index - 1]]
    return found


def draw(results: common.Results, path: Path) -> None:
    """The sweeps, and the curves by each one's recipe."""
    figure, axes = common.new_figure(2, width=4.8)
    for name, row in results["rows"].items():
        first = min(entry["warmup_steps"] for entry in row["tried"])
        points = [(e["learning_rate"], e["loss"]) for e in row["tried"] if e["warmup_steps"] == first]
        axes[0].plot(*zip(*points, strict=True), **common.style(name))
        recipe = row["recipe"]
        label = f"{name}: {recipe['learning_rate']:g}, {recipe['warmup_steps']}"
        axes[1].plot(row["steps"], row["loss"], **common.style(name) | {"label": label})
    axes[0].set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats a byte", title="short runs")
    axes[1].set(xlabel="step", yscale="log", title="each with its own rate and warm-up")
    axes[1].legend(fontsize=7)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__)
