"""One row of benchmarks/train_cpu.py: builds a model, then runs a repetition each time that it is asked.

Started by the driver, in the interpreter that has what the row needs.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

from peers_processes import Answer, serve

LEARNING_RATE, CLIP_NORM, WARMUP_STEPS = 1e-3, 1.0, 3
PACKAGES = {
    "ours": ["jax", "flax", "optax"],
    "rwkv_ops": ["rwkv_ops", "keras", "jax"],
    "usual": ["rwkv_ops", "keras", "jax"],
    "gpt": ["torch"],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker trains: a row of the table at one shape."""

    row: str
    """A key of PACKAGES."""
    batch_size: int
    sequence_length: int
    steps: int
    """Timed steps of a repetition."""
    num_layers: int
    width: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        """Tokens of one repetition."""
        return self.batch_size * self.sequence_length * self.steps


Step = Callable[[], float]


def batch(job: Job) -> tuple[Any, Any]:
    """The one batch that every row is trained on: inputs and targets [B, T], NumPy int32."""
    import numpy as np

    generator = np.random.default_rng(0)
    tokens = generator.integers(0, job.vocab_size, (job.batch_size, job.sequence_length + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def build_gpt(job: Job) -> tuple[Step, int]:
    """The step of the PyTorch GPT, which returns the loss, and the number of parameters."""
    import torch

    from torch_gpt import GPT, make_step

    torch.manual_seed(0)
    model = GPT(job.vocab_size, job.num_layers, job.width, job.width // 64, job.sequence_length)
    step = make_step(model, LEARNING_RATE, CLIP_NORM)
    inputs, targets = (torch.from_numpy(array).long() for array in batch(job))
    return lambda: step(inputs, targets), sum(parameter.numel() for parameter in model.parameters())


def build_rwkv(job: Job) -> tuple[Step, int]:
    """The training step of this library, or of a peer in its trainer, which returns the loss; number of parameters."""
    import jax
    import jax.numpy as jnp

    from rwkv_jax.config import ModelConfig, OptimizerConfig, StepConfig, TrainConfig
    from rwkv_jax.training.batch import Batch
    from rwkv_jax.training.functions import initial_state, make_train_functions

    operator: Any = implementation_of_rwkv_ops() if job.row == "rwkv_ops" else None
    model = ModelConfig(
        vocab_size=job.vocab_size, num_layers=job.num_layers, width=job.width, wkv_implementation=operator
    )
    config = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, clip_norm=CLIP_NORM
        ),
        training=StepConfig(batch_size=job.batch_size, sequence_length=job.sequence_length),
    )
    trainer = make_train_functions(config)
    if job.row == "usual":
        from usual_rwkv7 import UsualNextToken

        trainer = dataclasses.replace(trainer, objective=UsualNextToken(wkv7_of_rwkv_ops))
    state = initial_state(trainer, 0)
    train_step = jax.jit(trainer.train_step, donate_argnums=0)
    tokens = Batch(*map(jnp.asarray, batch(job)))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, tokens)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return step, config.model.num_parameters()


def wkv7_of_rwkv_ops(r: Any, log_w: Any, k: Any, v: Any, a: Any, b: Any, state: Any = None) -> tuple[Any, Any]:
    """The recurrence of rwkv_ops with our arguments: its decay is exp(-exp(w)), ours exp(log_w)."""
    import jax.numpy as jnp
    from rwkv_ops import generalized_delta_rule

    return generalized_delta_rule(r, jnp.log(-log_w), k, v, a, b, initial_state=state, output_final_state=True)


def implementation_of_rwkv_ops() -> Any:
    """That recurrence in the place of ours, in an otherwise equal model."""
    from rwkv_kernels.dispatch import Implementation, anything

    def run(*inputs: Any, **_options: Any) -> tuple[Any, Any]:
        return wkv7_of_rwkv_ops(*inputs)

    return Implementation(run, anything)


def versions(packages: list[str]) -> dict[str, str]:
    """Versions of Python and of `packages`, as installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def open_job(arguments: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Build a job's model and warm it up; what runs a repetition, whatever it is asked."""
    job = Job(**arguments)
    step, parameters = build_gpt(job) if job.row == "gpt" else build_rwkv(job)
    # The first step compiles, the next ones meet memory that the system has not handed out yet.
    losses = [step() for _ in range(WARMUP_STEPS)]

    def repeat(_request: dict[str, Any]) -> dict[str, Any]:
        step()  # not timed: another process has had the caches since our last turn
        began = time.perf_counter()
        for _ in range(job.steps):
            losses.append(step())
        return {"seconds": time.perf_counter() - began, "losses": losses}

    return {"losses": losses, "parameters": parameters, "versions": versions(PACKAGES[job.row])}, repeat


if __name__ == "__main__":
    serve(open_job)
