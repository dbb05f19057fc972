"""A run's model, made of its parameters: every objective, evaluation and sample builds it here."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from rwkv_jax.config import ModelConfig, TuningConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.context import UNSHARDED, MeshAxes
from rwkv_jax.models.initial_state import begin_texts
from rwkv_jax.models.tuned import ADAPTER, INITIAL_STATE, grafted

TEACHER = "teacher"
"""The name of a teacher's parameters among those of a run, and of its state in what a run carries."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunModel:
    """How a run's parameters make its model."""

    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model of a run without tuning."""
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    config: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The model's; read by a tuning run."""

    def base(self, params: Any) -> Any:
        """The parameters that are the model's own."""
        return {name: part for name, part in params.items() if name not in (ADAPTER, INITIAL_STATE, TEACHER)}

    def model(self, params: Any, dropout_keys: Array | None = None) -> LanguageModel:
        """The model of a run's parameters.

        Args:
          dropout_keys: a batch's, uint32 [B, T]; None without dropout, as in evaluation.
        """
        params = {name: part for name, part in params.items() if name != TEACHER}
        if self.tuning.is_partial:
            params = grafted(params, self.tuning, self.config, dropout_keys)
        return nnx.merge(self.graphdef, params)

    def first_state(self, params: Any, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any | None:
        """The state in which every text begins; None is the empty one.

        Args:
          axes: as in `LanguageModel.hidden`.
        """
        if not self.tuning.state:
            return None
        return begin_texts(params[INITIAL_STATE], self.model(params), batch_size, axes)
