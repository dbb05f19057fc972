"""Training: loop, step, losses, optimizer, checkpoints, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.training.batch import Batch, make_batch
    from rwkv_jax.training.checkpoints import Checkpoints
    from rwkv_jax.training.functions import TrainFunctions, abstract_state, initial_state, make_train_functions
    from rwkv_jax.training.loop import TrainResult, train
    from rwkv_jax.training.loss import TokenLosses, sum_losses, token_losses
    from rwkv_jax.training.objectives.next_token import NextToken
    from rwkv_jax.training.optimizer import make_optimizer
    from rwkv_jax.training.reporting.step_logger import NonFiniteError
    from rwkv_jax.training.run_model import RunModel
    from rwkv_jax.training.schedule import learning_rate_schedule
    from rwkv_jax.training.state import EvalSums, StepMetrics, TrainState
    from rwkv_jax.training.step import LossSums, Objective, Partition, train_step

__all__ = [
    "Batch",
    "Checkpoints",
    "EvalSums",
    "LossSums",
    "NextToken",
    "NonFiniteError",
    "Objective",
    "Partition",
    "RunModel",
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
    "train_step",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batch": ("Batch", "make_batch"),
        "checkpoints": ("Checkpoints",),
        "functions": ("TrainFunctions", "abstract_state", "initial_state", "make_train_functions"),
        "loop": ("TrainResult", "train"),
        "loss": ("TokenLosses", "sum_losses", "token_losses"),
        "objectives.next_token": ("NextToken",),
        "optimizer": ("make_optimizer",),
        "reporting.step_logger": ("NonFiniteError",),
        "run_model": ("RunModel",),
        "schedule": ("learning_rate_schedule",),
        "state": ("EvalSums", "StepMetrics", "TrainState"),
        "step": ("LossSums", "Objective", "Partition", "train_step"),
    },
)
