"""Does a model with a recurrence that begins from a Transformer learn faster than one from scratch, by which stages?

python -m experiments.conversion.run

A Transformer is trained first. Students have its blocks, with RWKV-7's time mixing in the place of attention, and read
as many bytes each: converted (copied, aligned for a third of the steps, then distilled); copied and distilled; copied
and trained on the text; from scratch by distillation, or on the text; and converted but for a layer that keeps its
attention. Each is trained with every learning rate, and the best one counts. The teacher's own bytes are not counted,
nor its forward pass in a student's steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common
from rwkv_jax.config import DistillationConfig, ModelConfig, ObjectiveName, TrainConfig, student_of


class Arm(NamedTuple):
    """How a student is trained."""

    stages: tuple[ObjectiveName, ...]
    """The first of two takes the share `Sizes.aligned` of the steps."""
    settings: dict[str, Any]
    """Of the distillation, in the first stage."""
    hybrid: bool = False
    """Keeps the teacher's attention in `Sizes.kept_layers`."""


CONVERTED, COPIED, HYBRID = "copied, aligned, distilled", "copied, distilled", "hybrid: copied, aligned, distilled"
COPIED_TEXT, DISTILLED, SCRATCH = "copied, on text", "from scratch, distilled", "from scratch, on text"

ARMS = {
    HYBRID: Arm(("align", "distill"), {"copy": True}, hybrid=True),
    CONVERTED: Arm(("align", "distill"), {"copy": True}),
    COPIED: Arm(("distill",), {"copy": True}),
    COPIED_TEXT: Arm(("distill",), {"copy": True, "kl_weight": 0.0, "ce_weight": 1.0}),
    DISTILLED: Arm(("distill",), {}),
    SCRATCH: Arm(("next_token",), {}),
}

COLORS = dict(zip(ARMS, ("#2878b5", "#1f6f5c", "#00a08a", "#9a6a00", "#7a5195", "#b0453a"), strict=True))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and runs."""

    arms: tuple[str, ...] = tuple(ARMS)
    num_layers: int = 3
    width: int = 64
    head_dim: int = 32
    sequence_length: int = 128
    teacher_steps: int = 2500
    teacher_batch: int = 16
    teacher_rate: float = 5e-3
    num_steps: int = 300
    """Of each student, all stages together."""
    batch_size: int = 8
    rates: tuple[float, ...] = (2e-3, 6e-3)
    aligned: float = 1 / 3
    kept_layers: tuple[int, ...] = (1,)
    """Attention of the hybrid."""
    evaluate_every: int = 50
    held_out: float = 0.005
    source: str = "python-stdlib"


SMALL = Sizes()
SMALLEST = Sizes(
    arms=(CONVERTED, COPIED_TEXT),
    num_layers=2,
    width=8,
    head_dim=4,
    sequence_length=4,
    teacher_steps=2,
    teacher_batch=2,
    num_steps=3,
    batch_size=2,
    rates=(1e-3,),
    evaluate_every=1,
    held_out=0.1,
    source=common.TINY,
)


def run_config(sizes: Sizes, model: ModelConfig, num_steps: int, rate: float, seed: int, **fields: Any) -> TrainConfig:
    """A run of one stage."""
    config = common.train_config(
        model,
        num_steps=num_steps,
        batch_size=fields.pop("batch_size", sizes.batch_size),
        sequence_length=sizes.sequence_length,
        learning_rate=rate,
        seed=seed,
        evaluate_every=fields.pop("evaluate_every", sizes.evaluate_every),
        source=sizes.source,
        held_out=sizes.held_out,
    )
    objective = fields.pop("objective", "next_token")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, objective=objective), **fields)


class Student(NamedTuple):
    """A student's held-out loss, by the bytes that it has read."""

    bytes_read: list[int]
    losses: list[float]
    last_loss: float
    """Of all held-out text; nats a byte, as the others."""


def train_student(sizes: Sizes, arm: Arm, teacher: ModelConfig, source: Path, rate: float) -> Student:
    """Trains a student in its stages.

    Args:
      source: the teacher's run folder, beside which the student's runs lie.
    """
    layers = [layer for layer in range(sizes.num_layers) if not arm.hybrid or layer not in sizes.kept_layers]
    model = student_of(teacher, layers)
    first = round(sizes.num_steps * sizes.aligned)
    steps = (sizes.num_steps,) if len(arm.stages) == 1 else (first, sizes.num_steps - first)
    bytes_read: list[int] = []
    losses: list[float] = []
    last = None
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        for number, (objective, num_steps) in enumerate(zip(arm.stages, steps, strict=True)):
            taught = objective != "next_token"
            settings = arm.settings if number == 0 else {}
            config = run_config(
                sizes,
                model,
                num_steps,
                rate,
                seed=number,  # other rows in each stage
                objective=objective,
                distillation=DistillationConfig(str(source), **settings) if taught else DistillationConfig(),
                initial_weights=str(Path(scratch) / str(number - 1)) if number else None,
            )
            run = common.train_run(config, source.parent, kept=f"{Path(scratch).name}/{number}")
            for step, loss in run.held_out:
                bytes_read.append((sum(steps[:number]) + step) * sizes.batch_size * sizes.sequence_length)
                losses.append(loss)
            last = run.last_held_out
    assert last is not None
    return Student(bytes_read, losses, last)


def measure(sizes: Sizes) -> common.Results:
    """Held-out loss of the teacher; and of each student with each rate, and along the run with the best one."""
    model = ModelConfig(
        architecture="transformer",
        vocab_size=common.NUM_BYTES,
        num_layers=sizes.num_layers,
        width=sizes.width,
        head_dim=sizes.head_dim,
    )
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = run_config(
            sizes,
            model,
            sizes.teacher_steps,
            sizes.teacher_rate,
            seed=100,
            batch_size=sizes.teacher_batch,
            evaluate_every=max(1, sizes.teacher_steps // 5),
        )
        teacher = common.train_run(config, folder, kept="teacher")
        common.progress(f"teacher: {teacher.held_out}, {teacher.last_held_out}")
        for name in sizes.arms:
            tried: dict[float, Student] = {}
            for rate in sizes.rates:
                tried[rate] = train_student(sizes, ARMS[name], model, folder / "teacher", rate)
                common.progress(f"{name}, rate {rate:g}: {tried[rate].last_loss:.4f}")
            best = min(tried, key=lambda rate: tried[rate].last_loss)
            rows[name] = {"rate": best, "tried": {r: x.last_loss for r, x in tried.items()}} | tried[best]._asdict()
    return {
        "parameters": {"teacher": model.num_parameters(), "student": student_of(model).num_parameters()},
        "teacher": {
            "bytes_read": sizes.teacher_steps * sizes.teacher_batch * sizes.sequence_length,
            "last_loss": teacher.last_held_out,
        },
        "rows": rows,
    }


def claims(results: common.Results) -> common.Claims:
    """What was expected before the first run."""
    loss = {name: row["last_loss"] for name, row in results["rows"].items()}
    return {
        "a student that begins from its teacher beats one from scratch at equal tokens": max(
            loss[CONVERTED], loss[COPIED]
        )
        < min(loss[DISTILLED], loss[SCRATCH]),
        "from scratch, a teacher is better than the text alone": loss[DISTILLED] < loss[SCRATCH],
        "copied, a student learns more from its teacher than from the text": loss[COPIED] < loss[COPIED_TEXT],
        "steps of alignment are better spent than on distillation alone": loss[CONVERTED] < loss[COPIED],
        "with attention kept in one layer less is lost": loss[HYBRID] < loss[CONVERTED],
    }


def draw(results: common.Results, path: Path) -> None:
    """Each student's held-out loss by the bytes that it has read, and the teacher's."""
    figure, (axes,) = common.new_figure(1, width=7.5, height=4)
    for name, row in results["rows"].items():
        thousands = [number / 1000 for number in row["bytes_read"]]
        label = f"{name} ({row['last_loss']:.3f})"
        axes.plot(thousands, row["losses"], "-o", color=COLORS[name], markersize=4, label=label)
    teacher = results["teacher"]
    axes.axhline(teacher["last_loss"], color="#444444", lw=0.8, ls="--", label=f"teacher ({teacher['last_loss']:.3f})")
    axes.set(xlabel="thousand bytes that the student has read", ylabel="held-out loss, nats a byte")
    axes.set_ylim(top=axes.get_ylim()[1] + 0.4)  # above the curves the legend hides none
    axes.legend(fontsize=8)
    common.save(figure, path)


if __name__ == "__main__":
    common.main(measure, draw, small=SMALL, smallest=SMALLEST, file=__file__, claims=claims)
