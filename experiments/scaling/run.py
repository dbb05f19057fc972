"""Does the loss fall as a power of the size, for RWKV as for a Transformer?

python -m experiments.scaling.run

Five sizes of each model, all trained on the same tokens in the same order. The law is fitted over parameters without
embedding and head, as is usual, since those are most of a small model: loss = a N^b, in nats a byte of held-out text.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of models and runs."""

    models: tuple[str, ...] = tuple(common.MODELS)
    shapes: tuple[tuple[int, int], ...] = ((2, 16), (2, 32), (2, 64), (3, 96), (4, 128))
    """Layers and widths."""
    head_dim: int = 16
    num_steps: int = 400
    batch_size: int = 8
    sequence_length: int = 128
    held_out: float = 0.01
    learning_rate: float = 6e-3
    """At width 64; for others times (64 / width)^(1/2)."""
    source: str = "python-stdlib"
    rates: tuple[tuple[str, float], ...] = (("Transformer", 3e-3),)
    """Learning rates of models that want another one."""


SMALL = Sizes()
SMALLEST = Sizes(
    models=("RWKV-4",),
    shapes=((2, 8),),
    head_dim=4,
    num_steps=2,
    batch_size=2,
    sequence_length=8,
    held_out=0.3,
    source=common.TINY,
)


def measure(sizes: Sizes) -> common.Results:
    """Held-out loss by size, and the law of each model."""
    rows: dict[str, dict[str, list[float]]] = {}
    laws = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            row = rows[name] = {"parameters": [], "loss": []}
            for num_layers, width in sizes.shapes:
                common.progress(f"{name}, {num_layers} x {width}")
                fields: dict[str, Any] = {"num_layers": num_layers, "width": width, "head_dim": sizes.head_dim}
                model = ModelConfig(**common.ALL_MODELS[name], vocab_size=common.NUM_BYTES, **fields)
                rate = dict(sizes.rates).get(name, sizes.learning_rate) * (64 / width) ** 0.5
                config = common.train_config(
                    model,
                    num_steps=sizes.num_steps,
                    batch_size=sizes.batch_size,
                    sequence_length=sizes.sequence_length,
                    learning_rate=rate,
                    source=sizes.source,
                    held_out=sizes.held_out,
                )
                run = common.train_run(config, Path(folder))
                assert run.last_held_out is not None
                row["parameters"].append(model.num_parameters() - 2 * common.NUM_BYTES * width)
                row["loss"].append(run.last_held_out)
            laws[name] = common.fit_power_law(row["parameters"], row["loss"])._asdict()
    return {"rows": rows, "laws": laws, "tokens": sizes.num_steps * sizes.batch_size * sizes.sequence_length}


def claims(results: common.Results) -> common.Claims:
    """The loss falls with every size, and nearly on a line."""
    losses = {name: row["loss"] for name, row in results["rows"].items()}
    return {
        "a larger model of a kind always has a lower loss": all(
            later < earlier for loss in losses.values() for earlier, later in itertools.pairwise(loss)
        ),
        "r^2 of every law is above 0.95": all(law["r_squared"] > 0.95 for law in results["laws"].values()),
    }


def draw(results: common.Results, path: Path) -> None:
    """Loss by parameters, with the laws."""
    figure, axes = common.new_figure(1, width=5.2)
    for name, row in results["rows"].items():
        law = results["laws"][name]
        style = common.style(name) | {"label": f"{name}: N^{law['slope']:.3f}, r² {law['r_squared']:.3f}"}
        axes[0].plot(row["parameters"], row["loss"], ls="none", **style)
        fitted = [2.718281828 ** law["intercept"] * n ** law["slope"] for n in row["parameters"]]
        axes[0].plot(row["parameters"], fitted, color=style["color"], lw=0.9)
    axes[0].set(xscale="log", yscale="log", xlabel="parameters N without embedding and head")
    axes[0].set(ylabel="held-out loss, nats a byte", title=f"{results['tokens']:,} tokens each")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
