"""Does a small student learn more from a teacher than from the text alone, at equal tokens?

python -m experiments.distillation.run

A teacher is trained first. Then the same student is trained on the same rows several times: alone, by the text's next
bytes; and taught, by what the teacher predicts, with all of its distribution or the most likely bytes, at temperatures,
and together with the text. Compared is the cross-entropy of held-out text, seed by seed. The teacher's own steps are
not counted, nor its forward pass in each of the student's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from rwkv_jax import save_pretrained
from rwkv_jax.config import DistillationConfig, ModelConfig, TrainConfig

ALONE = "alone"
TAUGHT: dict[str, dict[str, Any]] = {
    "taught": {},
    "taught, temperature 2": {"temperature": 2.0},
    "taught, 8 most likely": {"top_k": 8},
    "taught, and the text": {"kl_weight": 0.5, "ce_weight": 0.5},
}
"""Settings of the distillation, by name."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    taught: tuple[str, ...] = tuple(TAUGHT)
    teacher_layers: int = 4
    teacher_width: int = 128
    teacher_steps: int = 500
    num_layers: int = 2
    width: int = 32
    head_dim: int = 16
    num_steps: int = 250
    batch_size: int = 16
    sequence_length: int = 96
    learning_rate: float = 4e-3
    held_out: float = 0.02
    source: str = "python-stdlib"


SMALL = Sizes()
SMALLEST = Sizes(
    seeds=(0,),
    taught=("taught, 8 most likely",),
    teacher_layers=2,
    teacher_width=8,
    teacher_steps=2,
    width=8,
    head_dim=4,
    num_steps=2,
    batch_size=2,
    sequence_length=4,
    held_out=0.1,
    source=common.TINY,
)


def measure(sizes: Sizes) -> common.Results:
    """Held-out nats a byte of the teacher, and of each student by seed."""

    def config(num_layers: int, width: int, num_steps: int, seed: int) -> TrainConfig:
        return common.train_config(
            ModelConfig("7", vocab_size=common.NUM_BYTES, num_layers=num_layers, width=width, head_dim=sizes.head_dim),
            num_steps=num_steps,
            batch_size=sizes.batch_size,
            sequence_length=sizes.sequence_length,
            learning_rate=sizes.learning_rate,
            seed=seed,
            source=sizes.source,
            held_out=sizes.held_out,
        )

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_teacher = config(sizes.teacher_layers, sizes.teacher_width, sizes.teacher_steps, 100)
        teacher = common.train_run(of_teacher, folder)
        weights = folder / "teacher.safetensors"
        save_pretrained(common.model_of(of_teacher.model, teacher.params), weights)
        common.progress(f"teacher: {teacher.last_held_out}")
        for seed in sizes.seeds:
            alone = config(sizes.num_layers, sizes.width, sizes.num_steps, seed)
            runs = {ALONE: alone} | {name: _taught(alone, weights, TAUGHT[name]) for name in sizes.taught}
            for name, own in runs.items():
                loss = common.train_run(own, folder).last_held_out
                assert loss is not None
                found.setdefault(name, []).append(loss)
                common.progress(f"seed {seed}, {name}: {loss:.4f}")
    held_out = {name: np.asarray(losses) for name, losses in found.items()}
    student = config(sizes.num_layers, sizes.width, sizes.num_steps, 0).model
    return {
        "parameters": {"teacher": of_teacher.model.num_parameters(), "student": student.num_parameters()},
        "teacher": teacher.last_held_out,
        "held_out": held_out,
        "gain": {name: held_out[ALONE] - losses for name, losses in held_out.items() if name != ALONE},
    }


def _taught(alone: TrainConfig, weights: Path, settings: dict[str, Any]) -> TrainConfig:
    """The same run, which learns from the teacher."""
    return dataclasses.replace(
        alone,
        training=dataclasses.replace(alone.training, objective="distill"),
        distillation=DistillationConfig(str(weights), **settings),
    )


def claims(results: common.Results) -> common.Claims:
    """What holds for every seed."""
    return {
        f"the student is better {name} than alone, with every seed": min(gain) > 0
        for name, gain in results["gain"].items()
    }


def draw(results: common.Results, path: Path) -> None:
    """Each student's held-out loss, seed by seed, and the teacher's."""
    figure, (axes,) = common.new_figure(1, width=7.5)
    for place, (name, losses) in enumerate(results["held_out"].items()):
        axes.plot([place] * len(losses), losses, "o", color="#b0453a" if name == ALONE else "#1f6f5c")
    axes.axhline(results["teacher"], color="#444444", lw=0.8, ls="--", label="teacher")
    axes.set_xticks(range(len(results["held_out"])), results["held_out"], fontsize=8)
    axes.set(ylabel="held-out loss, nats a byte", xlim=(-0.5, len(results["held_out"]) - 0.5))
    axes.legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
