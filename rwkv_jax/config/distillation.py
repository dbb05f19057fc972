"""Distillation: a frozen teacher, from whose predictions a run learns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rwkv_jax.checks import checker, is_number, is_whole, require
from rwkv_jax.config.objective import WITH_TEACHER, ObjectiveName

if TYPE_CHECKING:
    from rwkv_jax.config.run import TrainConfig

_OF_OBJECTIVES: dict[str, tuple[ObjectiveName, ...]] = {"teacher": WITH_TEACHER, "copy": WITH_TEACHER}
"""Objectives that read a field; the others are read by distill alone."""


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A teacher, read if training.objective is distill; it is frozen, and in no checkpoint."""

    teacher: str | None = None
    """The teacher's weights: a run of any architecture, or whatever else `from_pretrained` reads. It must have been
    trained with the run's tokenizer."""
    copy: bool = False
    """Begins with the teacher's parameters wherever the student has the same ones; time mixing (model.rwkv_layers)
    takes the projections of the attention in whose place it is (docs/conversion.md)."""
    temperature: float = 1.0
    """Divides the logits of both models in the KL divergence, which is multiplied by its square (arXiv 1503.02531)."""
    kl_weight: float = 1.0
    """Weight of the KL divergence of the teacher's next-token probabilities from the student's."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy of the text's own next tokens."""
    top_k: int | None = None
    """The teacher's most likely tokens that the divergence tells apart; all others count as one. None is all tokens."""
    stored: str | None = None
    """Folder of the teacher's top_k most likely tokens for all rows of the run, which then does without the teacher.
    With a teacher, what is missing there is computed before the first step."""

    def __post_init__(self) -> None:
        check = checker(self, "distillation")
        check(self.teacher != "", "teacher", "name the teacher's weights, or leave it out")
        check(
            is_number(self.temperature) and 0 < self.temperature < float("inf"),
            "temperature",
            "must be greater than zero",
        )
        for name in ("kl_weight", "ce_weight"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < float("inf"), name, "must not be negative")
        check(
            self.top_k is None or (is_whole(self.top_k) and self.top_k >= 1), "top_k", "must be a whole number from 1"
        )
        check(bool(self.kl_weight or self.ce_weight), "kl_weight", "nothing would be minimized; weigh one of the terms")

    def check_run(self, run: TrainConfig) -> None:
        """Raises ConfigError for a field that the run's objective does not read and that was set, or one it lacks."""
        objective = run.training.objective
        for field in dataclasses.fields(self):
            readers = _OF_OBJECTIVES.get(field.name, ("distill",))
            require(
                objective in readers or getattr(self, field.name) == field.default,
                f"distillation.{field.name}",
                getattr(self, field.name),
                f"training.objective = {objective!r} does not read it; leave it out, or train {' or '.join(readers)}",
            )
        require(
            self.top_k is None or self.top_k <= run.model.vocab_size,
            "distillation.top_k",
            self.top_k,
            f"must be at most model.vocab_size = {run.model.vocab_size}",
        )
        require(
            not self.copy or run.initial_weights is None,
            "distillation.copy",
            self.copy,
            "begins with the teacher's parameters, and initial_weights names others; leave one of them out",
        )
        require(
            objective != "align" or not run.training.carry_state,
            "training.carry_state",
            run.training.carry_state,
            "alignment reads each row by itself; switch it off",
        )
        require(
            objective != "align" or not run.tuning.is_partial,
            "training.objective",
            objective,
            "alignment trains the mixers of a whole model; leave tuning out",
        )
        if self.stored is not None:
            self._check_stored(run)
        if objective in WITH_TEACHER:
            require(
                self.teacher is not None or self.stored is not None,
                "distillation.teacher",
                self.teacher,
                f"training.objective = {objective!r} learns from a teacher; name its weights",
            )

    def _check_stored(self, run: TrainConfig) -> None:
        check = checker(self, "distillation")
        check(self.stored != "", "stored", "name a folder, or leave it out")
        check(
            self.top_k is not None,
            "top_k",
            "a whole distribution of each token is not stored; say how many tokens, such as 64",
        )
        check(
            not self.copy,
            "copy",
            "the run does without the teacher; begin with --initial-weights, or leave distillation.stored out",
        )
        require(
            not run.training.carry_state,
            "training.carry_state",
            run.training.carry_state,
            "rows that go on have all text before them as context, and distillation.stored has each step's rows by "
            "themselves; switch it off, or leave distillation.stored out",
        )
