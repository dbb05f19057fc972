"""What trains a model: the loop, the step, losses, optimizer, checkpoints, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.training.batch import Batch, make_batch
    from rwkv_jax.training.checkpoints import Checkpoints
    from rwkv_jax.training.loop import TrainResult, train
    from rwkv_jax.training.loss import TokenLosses, sum_losses, token_losses
    from rwkv_jax.training.optimizer import learning_rate_schedule, make_optimizer
    from rwkv_jax.training.reporting.step_logger import NonFiniteError
    from rwkv_jax.training.step import (
        StepMetrics,
        TrainFunctions,
        TrainState,
        abstract_state,
        initial_state,
        make_train_functions,
    )

__all__ = [
    "Batch",
    "Checkpoints",
    "NonFiniteError",
    "StepMetrics",
    "TokenLosses",
    "TrainFunctions",
    "TrainResult",
    "TrainState",
    "abstract_state",
    "initial_state",
    "learning_rate_schedule",
    "make_batch",
    "make_optimizer",
    "make_train_functions",
    "sum_losses",
    "token_losses",
    "train",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batch": ("Batch", "make_batch"),
        "checkpoints": ("Checkpoints",),
        "loop": ("TrainResult", "train"),
        "loss": ("TokenLosses", "sum_losses", "token_losses"),
        "optimizer": ("learning_rate_schedule", "make_optimizer"),
        "reporting.step_logger": ("NonFiniteError",),
        "step": (
            "StepMetrics",
            "TrainFunctions",
            "TrainState",
            "abstract_state",
            "initial_state",
            "make_train_functions",
        ),
    },
)
