"""How far back can a model read what it needs, at equal parameters?

    python -m experiments.long_range.run

Three synthetic tasks: copying, of as many symbols as were trained and of more; multi-query associative recall, whose
floor is what a model scores that only knows which values are left; and recall of one pair at several distances. All
models have two layers of one width, and the parameters of the first one, by the width of their feed-forward part. All
take the same number of steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig

REFERENCE = "RWKV-7"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: its name, sizes and recipe."""

    title: str
    source: str
    vocab_size: int
    length: int
    """T of training."""
    lengths: tuple[int, ...] = ()
    """T of evaluation, where the task has other lengths."""
    num_steps: int = 800


COPYING = Task("copying", "synthetic:copying(num_symbols=14)", 17, 33, (33, 49, 65))
MQAR = Task("MQAR", "synthetic:mqar(num_pairs=4, num_keys=16, num_values=16)", 35, 32)
RECALL = Task(
    "recall",
    "synthetic:recall(num_pairs=4, num_keys=12, num_values=12, distances=(8, 16, 32, 48), noise=True)",
    27,
    57,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run."""

    models: tuple[str, ...] = ("RWKV-4", "RWKV-6", "RWKV-7", "Transformer", "Mamba-2", "Gated DeltaNet", "LSTM")
    tasks: tuple[Task, ...] = (COPYING, MQAR, RECALL)
    num_layers: int = 2
    width: int = 32
    head_dim: int = 16
    batch_size: int = 32
    learning_rate: float = 5e-3
    rates: tuple[tuple[str, float], ...] = (("Transformer", 2e-3),)
    """Learning rates of models that want another one."""
    evaluated_batches: int = 16


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    tasks=(Task("copying", "synthetic:copying(num_symbols=4)", 7, 5, (5,), 2),),
    width=8,
    head_dim=4,
    batch_size=2,
    evaluated_batches=1,
)


def measure(sizes: Sizes) -> common.Results:
    """Accuracy of each model in each task, and of its parts."""
    found: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in sizes.tasks:
            shape: dict[str, Any] = {"vocab_size": task.vocab_size, "num_layers": sizes.num_layers}
            shape |= {"width": sizes.width, "head_dim": sizes.head_dim}
            target = ModelConfig(**common.ALL_MODELS[REFERENCE], **shape).num_parameters()
            for name in sizes.models:
                model = ModelConfig(**common.ALL_MODELS[name], **shape).with_num_parameters(target, multiple=1)
                if model.sizes().context_length:
                    model = dataclasses.replace(model, context_length=max(task.length, *task.lengths, 1))
                config = common.synthetic_config(
                    model,
                    task.source,
                    num_steps=task.num_steps,
                    batch_size=sizes.batch_size,
                    sequence_length=task.length,
                    learning_rate=dict(sizes.rates).get(name, sizes.learning_rate),
                    lengths=task.lengths,
                    evaluated_batches=sizes.evaluated_batches,
                )
                answers = common.train_run(config, Path(folder)).answers
                common.progress(f"{task.title}, {name}: {answers['accuracy']:.3f}")
                row = {key.removesuffix(".accuracy"): x for key, x in answers.items() if key.endswith(".accuracy")}
                found.setdefault(task.title, {})[name] = {"accuracy": answers["accuracy"], "parts": row}
                found[task.title].setdefault("floor", answers["chance"])
                parameters.setdefault(task.title, {})[name] = model.num_parameters()
    return {"tasks": found, "parameters": parameters}


def claims(results: common.Results) -> common.Claims:
    """What the toys of others, and ours before, have shown."""
    mqar = results["tasks"]["MQAR"]
    return {
        "MQAR: RWKV-7 is right at 95%": mqar["RWKV-7"]["accuracy"] >= 0.95,
        "MQAR: RWKV-4 stays near the floor, below 70%": mqar["RWKV-4"]["accuracy"] < 0.7,
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by length or distance; a task without either as bars."""
    tasks = results["tasks"]
    figure, axes = common.new_figure(len(tasks), width=4.0)
    for panel, (title, rows) in zip(axes, tasks.items(), strict=True):
        models = {name: row for name, row in rows.items() if name != "floor"}
        panel.axhline(100 * rows["floor"], color="#444444", lw=0.8, ls="--")
        panel.set(title=title, ylabel="right answers, %", ylim=(0, 102))
        if not any(row["parts"] for row in models.values()):
            heights = [100 * row["accuracy"] for row in models.values()]
            panel.bar(range(len(models)), heights, color=[common.COLORS[name] for name in models])
            panel.set_xticks(range(len(models)), models, rotation=45, ha="right", fontsize=7)
            continue
        for name, row in models.items():
            places = [int(part.rpartition("_")[2]) for part in row["parts"]]
            panel.plot(places, [100 * x for x in row["parts"].values()], **common.style(name))
        panel.set(xlabel=f"{next(iter(row['parts'])).rpartition('_')[0]} (dashed: floor)")
    axes[0].legend(fontsize=7)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
