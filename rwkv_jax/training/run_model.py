"""A run's model, made of its parameters: every objective, evaluation and sample builds it here."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from rwkv_jax.config import TuningConfig
from rwkv_jax.models import LanguageModel

ADAPTER, INITIAL_STATE = "adapter", "initial_state"
"""Parameters of a tuning run beside the model's own."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunModel:
    """How a run's parameters make its model."""

    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model of a run without tuning."""
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)

    def model(self, params: Any) -> LanguageModel:
        """The model of a run's parameters."""
        if self.tuning.is_partial:
            params = {name: part for name, part in params.items() if name not in (ADAPTER, INITIAL_STATE)}
        return nnx.merge(self.graphdef, params)

    def first_state(self, params: Any, batch_size: int) -> Any | None:
        """The state in which every text begins; None is the empty one."""
        del params, batch_size
        return None
