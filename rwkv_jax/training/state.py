"""What a run carries from step to step, and what training and evaluation steps report."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array


class TrainState(NamedTuple):
    """All that a run carries from one step to the next."""

    params: Any
    """Nested dict of the parameters under their official names, trained and frozen ones."""
    opt_state: Any
    """Optax's state, of the trained parameters alone."""
    step: Any
    """int32: optimizer steps taken, which is also the position in the data."""
    key: Any
    """uint32 [2]: key data from which samples are drawn."""
    bad_steps: Any
    """int32: steps in a row that were skipped because loss or gradient was not finite."""
    skipped_steps: Any
    """int32: steps skipped in the whole run."""
    recurrent_state: Any = None
    """The model's state after each row of the batch; None where rows do not go on with one another."""


class StepMetrics(NamedTuple):
    """What a step reports."""

    loss: Array
    """Mean loss; of next tokens -log p(token), nats."""
    gradient_norm: Array
    """Global norm before clipping, of the trained parameters."""
    finite: Array
    """Whether the step was taken: loss and gradient were finite."""
    metrics: dict[str, Array] | None = None
    """Further means of the objective, by name."""


class EvalSums(NamedTuple):
    """What an evaluation reports: sums over a batch, so that batches of unequal masks add up."""

    loss: Array
    """Sum of the loss; of next tokens -log p(token), nats."""
    count: Array
    """What the mean is over: the number of tokens that are counted."""
