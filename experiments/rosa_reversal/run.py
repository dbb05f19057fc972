"""Does RWKV-7 with ROSA learn to reverse numbers with 40,000 parameters, and does it go on where it was not trained?

    python -m experiments.rosa_reversal.run

RWKV-LM's RWKV-v8/251105_reverse_run.py reverses up to 60 digits, and after longer training up to 120, with 99.8% and
99.6% of the digits right, with two layers of width 32: each adds what time mixing and what lookups of one bit make of
the same stream. Here that model and RWKV-7 alone, of the same depth and width, are trained on rows of one length and
evaluated on that and on longer ones. The demonstration's recipe is not published: this one is ours, and far shorter.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from experiments import common
from rwkv_jax.config import ModelConfig

ROSA, ALONE = "RWKV-7 with ROSA", "RWKV-7"
CANDIDATES: dict[str, dict[str, Any]] = {ROSA: {"generation": "7-rosa"}, ALONE: {"generation": "7"}}
RANKS: dict[str, Any] = dict.fromkeys(("decay_rank", "iclr_rank", "value_rank", "gate_rank"), 8)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and runs; as in the demonstration, but for the last four lines."""

    models: tuple[str, ...] = (ROSA, ALONE)
    num_layers: int = 2
    width: int = 32
    head_dim: int = 16
    digits: tuple[int, ...] = (20, 40, 60)
    """Of the rows; training has the first."""
    batch_size: int = 32
    num_steps: int = 1500
    learning_rate: float = 3e-3
    evaluated_batches: int = 8


SMALL = Sizes()
SMALLEST = Sizes(models=(ROSA,), width=8, head_dim=4, digits=(2,), batch_size=2, num_steps=2, evaluated_batches=1)


def length_of(digits: int) -> int:
    """T of a row: the beginning, the digits, a mark, and the digits reversed, the last of which is a target only."""
    return 2 * digits + 1


def config_of(name: str, sizes: Sizes) -> Any:
    """A run."""
    lengths = tuple(map(length_of, sizes.digits))
    own: dict[str, Any] = CANDIDATES[name] | RANKS | ({"rosa_window": max(lengths)} if name == ROSA else {})
    model = ModelConfig(
        **own,
        vocab_size=13,
        num_layers=sizes.num_layers,
        width=sizes.width,
        head_dim=sizes.head_dim,
    )
    return common.synthetic_config(
        model,
        "synthetic:reversal(num_symbols=10)",
        num_steps=sizes.num_steps,
        batch_size=sizes.batch_size,
        sequence_length=lengths[0],
        learning_rate=sizes.learning_rate,
        lengths=lengths,
        evaluated_batches=sizes.evaluated_batches,
    )


def measure(sizes: Sizes) -> common.Results:
    """Accuracy of the reversed digits of each model, by the digits of a row, and its parameters."""
    accuracy, parameters = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            config = config_of(name, sizes)
            answers = common.train_run(config, Path(folder)).answers
            found = {str(count): answers[f"length_{length_of(count)}.accuracy"] for count in sizes.digits}
            common.progress(f"{name}: {found}")
            accuracy[name], parameters[name] = found, config.model.num_parameters()
    return {"accuracy": accuracy, "parameters": parameters}


def claims(results: common.Results) -> common.Claims:
    """What the demonstration says, in small."""
    with_rosa, alone = (results["accuracy"][name] for name in (ROSA, ALONE))
    shortest, longest = (str(count) for count in (SMALL.digits[0], SMALL.digits[-1]))
    return {
        "RWKV-7 with ROSA has less than 41,000 parameters": results["parameters"][ROSA] < 41_000,
        "RWKV-7 with ROSA is right at 99% of the digits of 20, which it was trained on": with_rosa[shortest] >= 0.99,
        "RWKV-7 with ROSA is right at 90% of the digits of 60, three times as many": with_rosa[longest] >= 0.9,
        "RWKV-7 alone is 10 points behind at 60 digits": alone[longest] <= with_rosa[longest] - 0.1,
    }


def draw(results: common.Results, path: Path) -> None:
    """Accuracy by digits."""
    figure, axes = common.new_figure(1, width=4.4)
    for (name, found), marker in zip(results["accuracy"].items(), "o^", strict=False):
        axes[0].plot(
            [int(count) for count in found], [100 * share for share in found.values()], marker=marker, label=name
        )
    axes[0].set(xlabel="digits (the first: trained)", ylabel="right digits, %", title="Reversal")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
