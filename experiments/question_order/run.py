"""How many facts does a state hold, and does it help to know the question beforehand?

    python -m experiments.question_order.run

Some pairs of keys and values and one question, before the pairs or behind them, with the same symbols
(`synthetic:lookup`). A model that is asked first has one key to wait for; one that is asked last must have kept all
pairs. The size of RWKV-7's heads sets that of its state and nothing else of weight (width times head size numbers a
layer); a Transformer keeps everything. Each model learns both orders and all numbers of pairs together.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.synthetic.recall import Lookup

ORDERS = {"last": "question last", "first": "question first"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models, task and runs."""

    head_dims: tuple[int, ...] = (8, 32)
    """Of RWKV-7, smallest first."""
    transformer_head_dim: int | None = 32
    """None leaves the Transformer out."""
    num_layers: int = 2
    width: int = 64
    nums_pairs: tuple[int, ...] = (2, 4, 8, 16)
    num_keys: int = 16
    """And values."""
    num_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 4e-3
    transformer_rate: float = 2e-3
    evaluated_batches: int = 16


SMALL = Sizes()
SMALLEST = Sizes((4,), 4, 2, 8, (1, 2), 2, 2, 2, evaluated_batches=1)


def accuracies(sizes: Sizes, model: ModelConfig, folder: Path) -> dict[str, list[float]]:
    """Of a model trained in both orders: by order, a list over the numbers of pairs."""
    task = Lookup(sizes.nums_pairs, sizes.num_keys, sizes.num_keys)
    is_transformer = bool(model.sizes().context_length)
    if is_transformer:
        model = dataclasses.replace(model, context_length=task.min_length)
    config = common.synthetic_config(
        model,
        f"synthetic:{task}",
        num_steps=sizes.num_steps,
        batch_size=sizes.batch_size,
        sequence_length=task.min_length,
        learning_rate=sizes.transformer_rate if is_transformer else sizes.learning_rate,
        evaluated_batches=sizes.evaluated_batches,
    )
    answers = common.train_run(config, folder).answers
    return {order: [answers[f"{order}_{pairs}.accuracy"] for pairs in sizes.nums_pairs] for order in ORDERS}


def measure(sizes: Sizes) -> common.Results:
    """By model: the numbers of its state, and accuracies by order and number of pairs."""
    vocab_size = Lookup(sizes.nums_pairs, sizes.num_keys, sizes.num_keys).vocab_size
    shape: dict[str, Any] = {"vocab_size": vocab_size, "num_layers": sizes.num_layers, "width": sizes.width}
    models = {
        f"RWKV-7, heads of {head_dim}": ModelConfig(generation="7", head_dim=head_dim, **shape)
        for head_dim in sizes.head_dims
    }
    if sizes.transformer_head_dim is not None:
        models["Transformer"] = ModelConfig(architecture="transformer", head_dim=sizes.transformer_head_dim, **shape)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            is_rwkv = name != "Transformer"
            rows[name] = {
                "state": sizes.num_layers * sizes.width * model.head_dim if is_rwkv else None,
                "parameters": model.num_parameters(),
                **accuracies(sizes, model, Path(folder)),
            }
            common.progress(f"{name}: {rows[name]}")
    return {"rows": rows, "chance": [1 / pairs for pairs in sizes.nums_pairs]}


def claims(results: common.Results) -> common.Claims:
    """What is said of orders and states."""
    states = [row for row in results["rows"].values() if row["state"] is not None]
    smallest, transformer = states[0], results["rows"].get("Transformer")
    pairs = results["sizes"]["nums_pairs"]

    def gain(row: dict[str, Any]) -> float:
        return row["first"][-1] - row["last"][-1]

    learned = transformer is not None and max(transformer["first"][0], transformer["last"][0]) >= 0.9

    return {
        f"at {pairs[-1]} pairs the smallest state is 10 points better if asked first": gain(smallest) >= 0.1,
        f"asked last, the smallest state is 10 points worse at {pairs[-1]} pairs than at {pairs[0]}": smallest["last"][
            0
        ]
        >= smallest["last"][-1] + 0.1,
        f"asked last at {pairs[-1]} pairs, the largest state is 10 points above the smallest": (
            states[-1]["last"][-1] >= smallest["last"][-1] + 0.1 if len(states) > 1 else None
        ),
        "what the order changes is less for the Transformer": (
            abs(gain(transformer)) < gain(smallest) if transformer is not None and learned else None
        ),
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by the number of pairs, a panel for each order."""
    pairs = results["sizes"]["nums_pairs"]
    figure, axes = common.new_figure(len(ORDERS), sharey=True)
    colors = dict(zip(results["rows"], ["#00a08a", "#0b3d2e"], strict=False))
    for panel, (order, title) in zip(axes, ORDERS.items(), strict=True):
        for name, row in results["rows"].items():
            label = name if row["state"] is None else f"{name}: {row['state']:,} numbers of state"
            look = common.style(name) | {"label": label, "color": common.COLORS.get(name) or colors.get(name)}
            panel.plot(pairs, [100 * x for x in row[order]], **look)
        panel.plot(pairs, [100 * x for x in results["chance"]], "--", color="#444444", lw=0.8, label="chance")
        panel.set(xscale="log", title=title, xlabel="pairs in the text", ylim=(0, 102))
        panel.set_xticks(pairs, [str(number) for number in pairs])
        panel.minorticks_off()
    axes[0].set_ylabel("right answers, %")
    axes[0].legend(fontsize=7)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
