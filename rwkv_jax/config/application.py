"""Runs of applications: systems built of RWKV's layers whose model, data and objective are their own.

A config file gives `train` a subclass of `ApplicationConfig` with one more section. `APPLICATIONS` names its class, so
that a run folder, which holds plain values, finds the class again.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar

from rwkv_jax.checks import checker, require_known
from rwkv_jax.config.data import DataConfig
from rwkv_jax.config.reporting import EvaluationConfig
from rwkv_jax.config.run import TrainConfig
from rwkv_jax.config.step import StepConfig

APPLICATIONS: dict[str, str] = {
    "audio": "rwkv_jax.applications.audio.config:AudioConfig",
    "seq2seq": "rwkv_jax.applications.seq2seq.config:Seq2SeqConfig",
    "vision": "rwkv_jax.applications.vision.config:VisionConfig",
    "series": "rwkv_jax.applications.series.config:SeriesConfig",
}
"""By name the config's class, as MODULE:CLASS. A config file or test may add its own before building a config."""


@dataclasses.dataclass(frozen=True)
class ApplicationConfig(TrainConfig):
    """A run of an application, which takes its layers from `model`, and T from `training.sequence_length`."""

    application: ClassVar[str]
    """Its name in `APPLICATIONS`."""
    section: ClassVar[str]
    """The field that has the application's own settings."""
    splits_time: ClassVar[bool] = False
    """Whether a mesh may split T, which a model cannot that reads rows from both ends."""

    evaluation: EvaluationConfig = dataclasses.field(default_factory=lambda: EvaluationConfig(sample_prompts=()))

    def __post_init__(self) -> None:
        check = checker(self)
        random = f"{self.application} begins with random parameters, all of which are trained; leave it out"
        check(not self.tuning.is_partial, "tuning", random)
        check(self.initial_weights is None, "initial_weights", random)
        super().__post_init__()
        name, has_own = self.application, f"an application of this name, {self.application}, has its own"
        read = {
            "evaluation.sample_prompts": (self.evaluation.sample_prompts, (), f"{name} writes no text"),
            "evaluation.tasks": (self.evaluation.tasks, (), f"{name} is no language model"),
            "training.objective": (self.training.objective, StepConfig.objective, f"{has_own} objective"),
            "training.fused_loss": (self.training.fused_loss, False, f"{has_own} loss"),
            "training.loss_chunk": (self.training.loss_chunk, None, f"{has_own} loss"),
            "training.l2wrap": (self.training.l2wrap, StepConfig.l2wrap, f"{has_own} loss"),
            "training.carry_state": (self.training.carry_state, False, "each row is by itself"),
            "training.first_step": (self.training.first_step, 0, f"{name} begins with random parameters"),
        }
        for field in dataclasses.fields(DataConfig):
            reason = f"{has_own} data, set by {self.section}"
            read[f"data.{field.name}"] = (getattr(self.data, field.name), field.default, reason)
        for field, (value, default, reason) in read.items():
            check(value == default, field, f"{reason}; leave it out")
        check(
            self.parallel.sequence == 1 or self.splits_time,
            "parallel.sequence",
            f"{name} cannot split time; split rows with parallel.data or fsdp, or heads with parallel.tensor",
        )

    def load_application(self) -> Any:
        """The application itself, a `training.application.Application`; imports it, and JAX."""
        raise NotImplementedError

    def own_settings(self) -> dict[str, Any]:
        """The application's own settings, by name in the config."""
        own = dataclasses.asdict(getattr(self, self.section))
        return {f"{self.section}.{name}": value for name, value in own.items()}


def application_type(name: str) -> type[ApplicationConfig]:
    """The config class of an application.

    Raises:
      ConfigError: there is none of this name.
    """
    require_known(name, APPLICATIONS, "application", "application")
    module, _, kind = APPLICATIONS[name].partition(":")
    return getattr(importlib.import_module(module), kind)
