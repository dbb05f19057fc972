"""Which models can follow a state, and which only learn to at the length that they were trained at?

    python -m experiments.state_tracking.run

Parity: whether the number of ones so far is odd. S5 by swaps: the order of five things after each swap of two. The
label is asked for at every position, training is at one length, and evaluation at that and at longer ones. RWKV-7 is
there twice: as released, with eigenvalues w - a of a transition above 0.545 - 1 = -0.455, and with the wide range,
above 0.545 - 2 = -1.455 (`model.negative_eigenvalues`), so that -1 is within reach. All models of a task take the same
number of steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig

WIDE = "RWKV-7, wide"
CANDIDATES: dict[str, dict[str, Any]] = common.MODELS | {WIDE: {"generation": "7", "negative_eigenvalues": True}}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: its name, sizes and recipe."""

    title: str
    source: str
    vocab_size: int
    width: int
    head_dim: int
    batch_size: int
    length: int
    """Inputs of a training row."""
    longer: tuple[int, ...]
    """Inputs of longer rows in evaluation."""
    num_steps: int
    learning_rate: float
    rates: tuple[tuple[str, float], ...] = ()
    """Learning rates of models that want another one."""


PARITY = Task("parity", "synthetic:parity", 3, 32, 16, 64, 24, (48, 96, 192), 500, 5e-3, (("Transformer", 2e-3),))
SWAPS = Task(
    "S5 by swaps",
    "synthetic:word_problem(items=5, inputs='swaps')",
    121,
    *(64, 32, 32, 12),
    (24, 48),
    1500,
    4e-3,
    (("Transformer", 2e-3),),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run."""

    models: tuple[str, ...] = (WIDE, "RWKV-7", "RWKV-6", "Transformer")
    tasks: tuple[Task, ...] = (PARITY, SWAPS)
    num_layers: int = 2
    seeds: tuple[int, ...] = (0,)
    evaluated_batches: int = 16


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    tasks=(Task("parity", "synthetic:parity", 3, 8, 4, 2, 3, (), 2, 1e-3),),
    evaluated_batches=1,
)


def accuracies(task: Task, name: str, seed: int, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Share of right labels by inputs of a row."""
    lengths = (task.length, *task.longer)
    shape: dict[str, Any] = {"num_layers": sizes.num_layers, "width": task.width, "head_dim": task.head_dim}
    model = ModelConfig(**CANDIDATES[name], vocab_size=task.vocab_size, **shape)
    if model.sizes().context_length:
        model = dataclasses.replace(model, context_length=max(lengths) + 1)
    config = common.synthetic_config(
        model,
        task.source,
        num_steps=task.num_steps,
        batch_size=task.batch_size,
        sequence_length=task.length + 1,  # the row begins with the end of a text
        learning_rate=dict(task.rates).get(name, task.learning_rate),
        seed=seed,
        lengths=tuple(length + 1 for length in lengths),
        evaluated_batches=sizes.evaluated_batches,
    )
    answers = common.train_run(config, folder).answers
    return {str(length): answers[f"length_{length + 1}.accuracy"] for length in lengths}


def measure(sizes: Sizes) -> common.Results:
    """Accuracy of each model in each task, by length; a list over seeds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in sizes.tasks:
            for name in sizes.models:
                for seed in sizes.seeds:
                    row = accuracies(task, name, seed, sizes, Path(folder))
                    common.progress(f"{task.title}, {name}, seed {seed}: {row}")
                    for length, accuracy in row.items():
                        found.setdefault(task.title, {}).setdefault(name, {}).setdefault(length, []).append(accuracy)
    return {"accuracy": found}


def claims(results: common.Results) -> common.Claims:
    """The pattern: the wide range follows a state at any length, the others do not."""
    parity, swaps = (results["accuracy"][task.title] for task in (PARITY, SWAPS))

    def worst(rows: dict[str, Any], name: str, length: int) -> float:
        return min(rows[name][str(length)])

    def best(rows: dict[str, Any], name: str, length: int) -> float:
        return max(rows[name][str(length)])

    return {
        "parity: RWKV-7 with the wide range is right at 98% of 192 inputs, 8 times the trained length": worst(
            parity, WIDE, 192
        )
        >= 0.98,
        "parity: RWKV-7 as released, RWKV-6 and the Transformer are right at less than 80% of 192": all(
            best(parity, name, 192) < 0.8 for name in ("RWKV-7", "RWKV-6", "Transformer")
        ),
        "S5: RWKV-7 with the wide range is right at 80% of 48 inputs, 4 times the trained length": worst(
            swaps, WIDE, 48
        )
        >= 0.8,
        "S5: RWKV-7 as released is right at no more than 50% of 48": best(swaps, "RWKV-7", 48) <= 0.5,
        "S5: RWKV-6 and the Transformer are right at no more than 30% of 48": all(
            best(swaps, name, 48) <= 0.3 for name in ("RWKV-6", "Transformer")
        ),
        "S5: the wide range is 30 points above the released one at 48": worst(swaps, WIDE, 48)
        >= best(swaps, "RWKV-7", 48) + 0.3,
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by length."""
    figure, axes = common.new_figure(len(results["accuracy"]), width=4.4)
    for panel, (title, rows) in zip(axes, results["accuracy"].items(), strict=True):
        for name, by_length in rows.items():
            lengths = [int(length) for length in by_length]
            means = [100 * sum(values) / len(values) for values in by_length.values()]
            panel.plot(lengths, means, **common.style(name))
        panel.axvline(lengths[0], color="#444444", lw=0.8, ls="--")
        panel.set(xscale="log", xlabel="inputs (dashed: trained)", ylabel="right labels, %", title=title)
        panel.set_xticks(lengths, map(str, lengths))
        panel.minorticks_off()
    axes[0].legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
