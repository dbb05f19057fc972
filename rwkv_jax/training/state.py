"""The training state, and the metrics of training and evaluation steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax import Array


class TrainState(NamedTuple):
    """Everything that a run carries from step to step."""

    params: Any
    """Nested dict of the parameters under their official names, trained and frozen ones."""
    opt_state: Any
    """Optax's state for the trained parameters."""
    step: Any
    """int32: optimizer steps taken, which is also the position in the data."""
    key: Any
    """uint32 [2]: key data for sampling."""
    bad_steps: Any
    """int32: consecutive steps skipped because loss or gradient was not finite, or a spike."""
    skipped_steps: Any
    """int32: steps skipped in the whole run."""
    recurrent_state: Any = None
    """The recurrent state after each row of the batch; with a teacher a dict of `model`'s and `teacher`'s. None if no
    state is carried."""
    recent: Any = None
    """float32 [2, W]: loss and gradient norm of the last W steps taken, NaN where there was none; None without a spike
    guard."""
    ema: Any = None
    """Nested dict of the averages of the trained parameters; None if none are kept."""


class StepMetrics(NamedTuple):
    """Metrics of a step."""

    loss: Array
    """Mean loss; for next tokens -log p(token) in nats."""
    gradient_norm: Array
    """Global norm before clipping, of the trained parameters."""
    taken: Array
    """Whether the step was taken: loss and gradient were finite, and no spike."""
    metrics: dict[str, Array] | None = None
    """Further means reported by the objective, by name."""


class EvalSums(NamedTuple):
    """Sums of an evaluation over a batch, which can be added over batches with different masks."""

    loss: Array
    """Sum of the loss; for next tokens -log p(token) in nats."""
    count: Array
    """Denominator of the means: the number of tokens counted."""
    metrics: Mapping[str, Array] = {}
    """Sums of further metrics of the objective, by name."""
