"""Which facts do the weights know, by how often they were told?

    python -m experiments.rare_facts.run

Keys with values that never change, told with Zipf's frequencies (`synthetic:facts`). Only the first time that a row has
a key counts, so that the weights must answer, not the text. Accuracy is by ranges of ranks, each four times as wide as
the one before, beside the number of times that such a fact was told in training.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path

from experiments import common
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.synthetic.facts import Facts


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models, task and runs."""

    widths: tuple[int, ...] = (16, 64)
    head_dim: int = 16
    num_layers: int = 2
    num_facts: int = 2048
    num_values: int = 32
    length: int = 33
    """T: 16 facts in a row."""
    num_steps: int = 60
    batch_size: int = 32
    learning_rate: float = 5e-3
    evaluated_batches: int = 16


SMALL = Sizes()
SMALLEST = Sizes((8,), 4, 2, 5, 2, 5, 2, 2, evaluated_batches=1)


def measure(sizes: Sizes) -> common.Results:
    """By width: accuracy of each range of ranks; and how often a fact of it was told in training, in the mean."""
    task = Facts(sizes.num_facts, sizes.num_values)
    told = sizes.num_steps * sizes.batch_size * (sizes.length // 2) * task.probabilities
    variants = task.variants()
    buckets = [variant.ranks for variant in variants.values() if isinstance(variant, Facts)]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for width in sizes.widths:
            model = ModelConfig(
                generation="7",
                vocab_size=task.vocab_size,
                num_layers=sizes.num_layers,
                width=width,
                head_dim=sizes.head_dim,
            )
            config = common.synthetic_config(
                model,
                f"synthetic:{task}",
                num_steps=sizes.num_steps,
                batch_size=sizes.batch_size,
                sequence_length=sizes.length,
                learning_rate=sizes.learning_rate,
                evaluated_batches=sizes.evaluated_batches,
            )
            answers = common.train_run(config, Path(folder)).answers
            accuracy = [answers[f"{name}.accuracy"] for name in variants]
            rows[str(width)] = {
                "parameters": model.num_parameters(),
                "all": answers["accuracy"],
                "accuracy": accuracy,
            }
            common.progress(f"width {width}: {rows[str(width)]}")
    return {
        "rows": rows,
        "ranks": buckets,
        "told": [told[first:end].mean() for first, end in buckets],
        "chance": task.chance(sizes.length),
    }


def claims(results: common.Results) -> common.Claims:
    """The head of the distribution is known before its tail."""
    rows = [row["accuracy"] for row in results["rows"].values()]
    return {
        "rarer facts are known less well, at every width": all(
            before >= after - 0.01 for row in rows for before, after in itertools.pairwise(row)
        ),
        "the most frequent facts are known, 95% and more at every width": all(row[0] >= 0.95 for row in rows),
        "the rarest are known 10 points less well than the most frequent, at every width": all(
            row[0] >= row[-1] + 0.1 for row in rows
        ),
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by how often a fact was told."""
    figure, (axes,) = common.new_figure(1, width=5.2)
    for color, (width, row) in zip(["#8a5fbf", "#1f6f5c"], results["rows"].items(), strict=False):
        label = f"width {width}: {row['parameters']:,} parameters"
        axes.plot(results["told"], [100 * x for x in row["accuracy"]], marker="o", ms=4, color=color, label=label)
    axes.axhline(100 * results["chance"], color="#444444", lw=0.8, ls="--", label="chance")
    axes.set(xscale="log", xlabel="times that such a fact was told in training", ylabel="known, %", ylim=(0, 102))
    axes.legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
