"""Does RWKV-4 learn faster with small initial token vectors and a norm after them, as its authors advise?

python -m experiments.initialization.run

Four models, each trained with the same data and seeds: token vectors drawn within +-1e-4 or within +-1, with ln0, the
extra layer norm after the embedding, and without it. Compared is the area under the curve: the mean training loss over
all steps. The difference of two is taken seed by seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from flax import nnx

from experiments import common
from rwkv_jax.config import GENERATIONS, ModelConfig
from rwkv_jax.config.generations.rwkv4 import RWKV4Spec
from rwkv_jax.models.block import Block
from rwkv_jax.models.rwkv4 import RWKV4, RWKV4Block

WITHOUT_LN0 = "4 without ln0"

SMALL_WITH = "+-1e-4, ln0"
VARIANTS: dict[str, tuple[str, float]] = {
    SMALL_WITH: ("4", 1e-4),
    "+-1e-4, no ln0": (WITHOUT_LN0, 1e-4),
    "+-1, ln0": ("4", 1.0),
    "+-1, no ln0": (WITHOUT_LN0, 1.0),
}
"""Generation and bound of the initial token vectors, by name."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and runs."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_layers: int = 2
    width: int = 64
    num_steps: int = 200
    batch_size: int = 16
    sequence_length: int = 64
    learning_rate: float = 4e-3
    source: str = "python-stdlib"


SMALL = Sizes()
SMALLEST = Sizes(
    variants=(SMALL_WITH, "+-1, no ln0"),
    seeds=(0,),
    width=8,
    num_steps=2,
    batch_size=2,
    sequence_length=4,
    source=common.TINY,
)


class BlockWithoutLn0(RWKV4Block):
    """A block of RWKV-4 whose ln0 does nothing."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.is_first = False


class RWKV4WithoutLn0(RWKV4):
    """RWKV-4 whose token vectors enter the first block as they are."""

    block_type: ClassVar[type[Block]] = BlockWithoutLn0


class SpecWithoutLn0(RWKV4Spec):
    """RWKV-4 without ln0; its parameters are there, and unused."""

    name = WITHOUT_LN0
    model_class = f"{__name__}:RWKV4WithoutLn0"


@contextlib.contextmanager
def generation_without_ln0() -> Iterator[None]:
    """Meanwhile `model.generation` may name it."""
    GENERATIONS[WITHOUT_LN0] = SpecWithoutLn0()
    try:
        yield
    finally:
        del GENERATIONS[WITHOUT_LN0]


def measure(sizes: Sizes) -> common.Results:
    """Training losses of each variant, by seed and step, in nats a byte; and differences of their means."""
    losses: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, generation_without_ln0():
        for name in sizes.variants:
            generation, bound = VARIANTS[name]
            model = ModelConfig(
                generation=generation,
                vocab_size=common.NUM_BYTES,
                num_layers=sizes.num_layers,
                width=sizes.width,
                embedding_bound=bound,
            )
            for seed in sizes.seeds:
                common.progress(f"{name}, seed {seed}")
                config = common.train_config(
                    model,
                    num_steps=sizes.num_steps,
                    batch_size=sizes.batch_size,
                    sequence_length=sizes.sequence_length,
                    learning_rate=sizes.learning_rate,
                    seed=seed,
                    source=sizes.source,
                    log_every=1,
                )
                losses.setdefault(name, []).append(common.train_run(config, Path(folder)).losses)
    curves = {name: np.asarray(rows) for name, rows in losses.items()}  # [seeds, steps]
    means = {name: rows.mean(axis=1) for name, rows in curves.items()}
    return {
        "mean_loss": means,
        "behind_the_first": {name: mean - means[SMALL_WITH] for name, mean in means.items() if name != SMALL_WITH},
        "last_loss": {name: rows[:, -len(rows[0]) // 10 :].mean(axis=1) for name, rows in curves.items()},
        "curves": {name: rows.mean(axis=0) for name, rows in curves.items()},
    }


def claims(results: common.Results) -> common.Claims:
    """What holds for every seed."""
    behind = results["behind_the_first"]
    return {
        f"small vectors with ln0 learn faster than {name}, with every seed": min(behind[name]) > 0
        for name in ("+-1, ln0", "+-1, no ln0")
    }


def draw(results: common.Results, path: Path) -> None:
    """The curves, and how far each seed's mean is behind."""
    figure, axes = common.new_figure(2, width=4.4)
    colors = dict(zip(VARIANTS, ("#1f6f5c", "#2878b5", "#d19a2a", "#b0453a"), strict=True))
    for name, curve in results["curves"].items():
        axes[0].plot(range(1, len(curve) + 1), curve, color=colors[name], label=name)
    axes[0].set(xlabel="step", ylabel="training loss, nats a byte", title="mean of the seeds")
    axes[0].legend(fontsize=8)
    for place, (name, values) in enumerate(results["behind_the_first"].items()):
        axes[1].plot([place] * len(values), values, "o", color=colors[name])
    axes[1].axhline(0, color="#444444", lw=0.8)
    axes[1].set_xticks(range(len(results["behind_the_first"])), results["behind_the_first"], fontsize=8)
    axes[1].set(ylabel="mean loss behind the first, nats", title="each seed", xlim=(-0.5, 2.5))
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
