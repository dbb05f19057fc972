"""Checkpoints by Orbax: written atomically in the background, restored into the current shardings.

`rwkv_jax.run_folder` defines their paths and loads models from them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from rwkv_jax.parallel.coordination import allgather_text, differences
from rwkv_jax.parallel.processes import DisagreementError, Processes
from rwkv_jax.run_folder import BEST, CHECKPOINTS, open_checkpoints
from rwkv_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves in flight.

    In a run of several processes, all call each method; only the first renames, and its result holds for all.
    """

    def __init__(
        self, run_dir: Path, keep: int, report: Callable[[str], None], processes: Processes | None = None
    ) -> None:
        self._report, self._processes = report, processes or Processes()
        self._latest = open_checkpoints(run_dir / CHECKPOINTS, keep)
        self._best = open_checkpoints(run_dir / BEST, 1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._latest.close()
        self._best.close()

    def restore(self, like: TrainState) -> TrainState | None:
        """Restores the newest checkpoint that is intact in every process; None if there is none.

        A damaged one is reported and renamed with the prefix `damaged-`, and the one before is tried.

        Args:
          like: shapes, dtypes and the shardings to restore into.

        Raises:
          DisagreementError: the processes see different checkpoints.
        """
        for step in self._steps():
            state, reason = None, ""
            try:
                state = _load_alone(Path(str(self._latest.directory)) / str(step), like, self._processes)
            except Exception as error:  # Whatever Orbax raises for a damaged file, an older checkpoint may be intact.
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            # Each process reads its own share; only some shares may be damaged.
            reasons = allgather_text(self._processes, f"what checkpoint {step} holds", reason)
            if not any(reasons):
                return state
            self._set_aside(step, next(filter(None, reasons)))
        return None

    def _steps(self) -> list[int]:
        """Steps of the existing checkpoints, newest first."""
        steps = [checkpoint.step for checkpoint in reversed(list(self._latest.checkpoints))]
        seen = allgather_text(self._processes, "checkpoints", str(steps))
        if table := differences([{"steps": text} for text in seen]):
            raise DisagreementError(
                f"{self._latest.directory}: the processes see different checkpoints there; put the run folder on a "
                f"disk that all share:\n{table}"
            )
        return steps

    def _set_aside(self, step: int, reason: str) -> None:
        if self._processes.is_first:
            folder = Path(str(self._latest.directory)) / str(step)
            aside = folder.with_name(f"damaged-{step}-{os.getpid()}")
            folder.rename(aside)
            self._report(f"checkpoint of step {step} is damaged ({reason}); moved to {aside}")
        allgather_text(self._processes, f"checkpoint {step}, moved aside", "")
        self._latest.reload()  # or Orbax would believe that the step exists and never save it again

    def best_loss(self) -> float:
        """Held-out loss of the best checkpoint; infinity if there is none, or only a damaged one."""
        metadata: Any = None
        if (latest := self._best.latest) is not None:
            # Whatever Orbax raises for a damaged file, a better checkpoint will replace it.
            with contextlib.suppress(Exception):
                metadata = self._best.metadata(latest.step).custom_metadata
        loss = float(metadata["held_out_loss"]) if metadata else math.inf
        return float(allgather_text(self._processes, "best loss", repr(loss))[0])

    def save(self, state: TrainState, step: int) -> None:
        """Starts to write a checkpoint; an existing one of the same step is kept."""
        # A run killed now must not resume after an evaluation whose best checkpoint was not finished.
        self._best.wait()
        _save(self._latest, state, step, {})

    def save_best(self, state: TrainState, step: int, held_out_loss: float) -> None:
        """Starts to write the best checkpoint, which replaces the previous one."""
        _save(self._best, state, step, {"held_out_loss": held_out_loss})

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._latest.wait()
        self._best.wait()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """The state as a plain dict without None, so that the files do not depend on our class."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def _save(checkpointer: ocp.training.Checkpointer, state: TrainState, step: int, metadata: dict[str, Any]) -> None:
    if any(checkpoint.step == step for checkpoint in checkpointer.checkpoints):
        return
    # The caller's next step reuses these buffers, and on a CPU Orbax writes from the very buffers it is given.
    state = jax.tree.map(jnp.copy, state)
    checkpointer.save_async(step, _as_tree(state), force=True, custom_metadata=metadata)


def _load_alone(folder: Path, like: TrainState, processes: Processes) -> TrainState:
    """Reads this process's share of a checkpoint without waiting for other processes.

    With Orbax's barrier they would wait for a process with a damaged share.
    """
    context = ocp.Context()
    alone: Any = context.multiprocessing
    alone.primary_host, alone.active_processes = processes.index, {processes.index}
    alone.barrier_sync_key_prefix = f"process_{processes.index}"
    with context:
        return TrainState(**ocp.load(str(folder), _as_tree(like)))
