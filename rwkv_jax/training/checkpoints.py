"""Checkpoints by Orbax: written atomically in the background, restored into the current shardings.

`rwkv_jax.run_folder` defines their paths and loads models from them. Beside its arrays a checkpoint has their digests,
the step, and the sums of the logging window that it was saved within, all under a checksum of their own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from rwkv_jax.checkpoint_files import (
    CheckpointError,
    DamagedError,
    changed_arrays,
    first_line,
    is_damage,
    open_checkpoints,
    read_metadata,
    writing,
)
from rwkv_jax.digests import digest_tree, paths_of
from rwkv_jax.json_object import with_digest
from rwkv_jax.parallel.coordination import allgather_text, differences
from rwkv_jax.parallel.processes import DisagreementError, Processes
from rwkv_jax.run_folder import BEST, CHECKPOINTS
from rwkv_jax.training.best import LOSS
from rwkv_jax.training.state import TrainState

MAX_CLOSE_SECONDS = 30.0
"""How long an error waits for saves in flight before it is raised all the same."""

DAMAGED, SUSPECT = "damaged-", "suspect-"
"""Prefixes of the folders of checkpoints that were set aside."""


class Restored(NamedTuple):
    """A checkpoint that was restored."""

    state: TrainState
    window: Mapping[str, Any]
    """What `StepLogger.window` gave when it was saved."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves in flight.

    In a run of several processes, all call each method; only the first renames, and its result holds for all.
    Whatever cannot be written is a `CheckpointError`, raised by the save itself, a later one or the end.
    """

    def __init__(
        self, run_dir: Path, keep: int, report: Callable[[str], None], processes: Processes | None = None
    ) -> None:
        self._report, self._processes = report, processes or Processes()
        with writing(run_dir):
            self._latest = open_checkpoints(run_dir / CHECKPOINTS, keep)
            self._best = open_checkpoints(run_dir / BEST, 1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            with contextlib.ExitStack() as stack:  # both, whatever the first one raises
                for checkpointer in (self._best, self._latest):
                    stack.enter_context(writing(Path(str(checkpointer.directory))))
                    stack.callback(checkpointer.close)
        else:
            self._close_within(MAX_CLOSE_SECONDS)

    def _close_within(self, seconds: float) -> None:
        """Waits for saves in flight, but not for ever: another process may be gone, or a disk."""

        def close(checkpointer: ocp.training.Checkpointer) -> None:
            with contextlib.suppress(Exception):  # the error that ends the run says more
                checkpointer.close()

        closing = [threading.Thread(target=close, args=(each,), daemon=True) for each in (self._latest, self._best)]
        until = time.monotonic() + seconds
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in closing):
            self._report(f"a save did not end within {seconds:g} seconds, and is left; it will be no checkpoint")

    def restore(self, like: TrainState, suspect: int | None = None) -> Restored | None:
        """Restores the newest checkpoint that is intact in every process; None if none was ever saved.

        Those that are proven damaged, by a digest or their structure, are passed over, and once an older one has been
        restored, reported and renamed with the prefix `damaged-`.

        Args:
          like: shapes, dtypes and the shardings to restore into.
          suspect: a step right after which steps were not finite: its checkpoint is passed over for the one before, if
            there is one, and renamed with the prefix `suspect-`.

        Raises:
          DisagreementError: the processes see different checkpoints.
          CheckpointError: a checkpoint cannot be read for another reason than damage, is of another step than its name
            says or of another optimizer; or there are damaged ones and none that is intact, which all stay.
        """
        steps, passed = self._steps(), dict[int, str]()
        if suspect in steps and suspect != steps[-1]:
            passed[suspect] = ""
        for step in [step for step in steps if step not in passed]:
            loaded, damage = self._load(step, like)
            if loaded is None or damage is not None:
                passed[step], loaded = damage or "", None  # not held beside the next one
                continue
            for other, reason in passed.items():
                if other > step:
                    self._set_aside(other, reason)
            return Restored(TrainState(**loaded.tree), loaded.metadata["window"])
        folder = Path(str(self._latest.directory))
        aside = sorted(path.name for path in folder.glob(f"{DAMAGED}*")) if folder.is_dir() else []
        found = " ".join([*(f"{step} ({reason})" for step, reason in passed.items()), *aside])
        if any(allgather_text(self._processes, "damaged checkpoints", found)):
            raise CheckpointError(
                f"{folder}: none of its checkpoints is intact: {found}. Put one back from a copy, begin a new run in "
                "another --run-dir, or set all of this one aside and begin again with --restart"
            )
        return None

    def _load(self, step: int, like: TrainState) -> tuple[_Loaded | None, str | None]:
        """A checkpoint's arrays, or what is damaged of it for any process; raises CheckpointError for anything else."""
        folder = self._folder(step)
        loaded, damage = self._gathered(
            f"what checkpoint {step} holds", folder, lambda: _load_alone(folder, step, like, self._processes)
        )
        if damage is not None:
            return None, damage
        # Only now, when every process has its share: digests are sums over all of them.
        _, damage = self._gathered(f"digests of checkpoint {step}", folder, lambda: _verify(folder, loaded))
        return loaded, damage

    def _gathered(self, subject: str, folder: Path, read: Callable[[], Any]) -> tuple[Any, str | None]:
        """What `read` returns, and the damage that any process has found; raises what any has found besides."""
        result, damage, fault = None, "", ""
        try:
            result = read()
        except DamagedError as error:
            damage = str(error)
        except CheckpointError as error:
            fault = str(error)
        except Exception as error:  # whatever Orbax raises
            if is_damage(error, folder):
                damage = first_line(error)
            else:
                fault = (
                    f"{folder}: cannot be read ({first_line(error)}); that proves no damage, so it stays as it is: "
                    "mend the cause and start again with the same command"
                )
        found = allgather_text(self._processes, subject, json.dumps([damage, fault]))
        damages, faults = zip(*(json.loads(text) for text in found), strict=True)
        if any(faults):
            raise CheckpointError(next(filter(None, faults)))
        return result, next(filter(None, damages), None)

    def _folder(self, step: int) -> Path:
        return Path(str(self._latest.directory)) / str(step)

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
            folder = self._folder(step)
            aside = folder.with_name(f"{DAMAGED if reason else SUSPECT}{step}-{os.getpid()}")
            folder.rename(aside)
            what = f"is damaged ({reason})" if reason else "is passed over, since the step after it was not finite"
            self._report(f"checkpoint of step {step} {what}; moved to {aside}")
        allgather_text(self._processes, f"checkpoint {step}, moved aside", "")
        self._latest.reload()  # or Orbax would believe that the step exists and never save it again

    def best_loss(self, by: str = LOSS) -> float:
        """Held-out loss of the best checkpoint; infinity if there is none, or only a damaged one.

        Args:
          by: what it is the best by, `Best.by`; infinity if the checkpoint was chosen by something else.

        Raises:
          CheckpointError: it is there and cannot be read.
        """
        loss = math.inf
        if (latest := self._best.latest) is not None:
            folder = Path(str(self._best.directory)) / str(latest.step)
            try:
                loss = float(read_metadata(folder).get(_best_key(by), math.inf))
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: cannot be read ({first_line(error)}); see to its rights and its disk, and start again"
                ) from error
            except DamagedError as error:  # a better one will replace it
                self._report(f"best checkpoint, of step {latest.step}, is damaged ({error}); the next one replaces it")
        return float(allgather_text(self._processes, "best loss", repr(loss))[0])

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, if there is one."""
        return None if self._best.latest is None else self._best.latest.step

    def save(self, state: TrainState, step: int, window: Mapping[str, Any] | None = None) -> None:
        """Starts to write a checkpoint; an existing one of the same step is kept.

        Args:
          window: sums of the logging window, for `Restored.window`.
        """
        # A run killed now must not resume after an evaluation whose best checkpoint was not finished.
        with writing(Path(str(self._best.directory))):
            self._best.wait()
        _save(self._latest, state, step, {"window": dict(window or {})})

    def save_best(self, state: TrainState, step: int, held_out_loss: float, by: str = LOSS) -> None:
        """Starts to write the best checkpoint, which replaces the previous one; `by` as in `best_loss`."""
        _save(self._best, state, step, {_best_key(by): held_out_loss})

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        for checkpointer in (self._latest, self._best):
            with writing(Path(str(checkpointer.directory))):
                checkpointer.wait()


def _best_key(by: str) -> str:
    return "held_out_loss" if by == LOSS else f"best by {by}"


def _as_tree(state: TrainState) -> dict[str, Any]:
    """The state as a plain dict without None, so that the files do not depend on our class."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def _save(checkpointer: ocp.training.Checkpointer, state: TrainState, step: int, extra: dict[str, Any]) -> None:
    if any(checkpoint.step == step for checkpoint in checkpointer.checkpoints):
        return
    # The caller's next step reuses these buffers, and on a CPU Orbax writes from the very buffers it is given.
    tree = jax.tree.map(jnp.copy, _as_tree(state))
    metadata = with_digest({"step": step, "digests": digest_tree(tree)} | extra)
    with writing(Path(str(checkpointer.directory))):
        checkpointer.save_async(step, tree, force=True, custom_metadata=metadata)


class _Loaded(NamedTuple):
    """What a checkpoint holds, as one process has read it."""

    tree: dict[str, Any]
    metadata: Mapping[str, Any]


def _load_alone(folder: Path, step: int, like: TrainState, processes: Processes) -> _Loaded:
    """Reads this process's share of a checkpoint without waiting for other processes.

    With Orbax's barrier they would wait for a process with a damaged share.
    """
    context = ocp.Context()
    alone: Any = context.multiprocessing
    alone.primary_host, alone.active_processes = processes.index, {processes.index}
    alone.barrier_sync_key_prefix = f"process_{processes.index}"
    with context:
        metadata = read_metadata(folder)
        if metadata["step"] != step:
            raise CheckpointError(
                f"{folder}: holds the state after step {metadata['step']}, not {step}; give the folder its own name "
                "back, or move it away"
            )
        wanted, saved = paths_of(_as_tree(like)).keys(), metadata["digests"].keys()
        if wanted != saved:
            missing, surplus = sorted(wanted - saved)[:3], sorted(saved - wanted)[:3]
            raise CheckpointError(
                f"{folder}: is of another kind of run: it lacks {missing or 'nothing'} and has {surplus or 'nothing'} "
                "that this one does not know (the first three of each); take the settings that it was begun with"
            )
        return _Loaded(ocp.load(str(folder), _as_tree(like)), metadata)


def _verify(folder: Path, loaded: _Loaded) -> None:
    """Raises DamagedError if arrays have other bits than were saved; all processes call it together."""
    changed = changed_arrays(loaded.tree, loaded.metadata["digests"])
    if "step" in changed and len(changed) > 1:
        raise CheckpointError(
            f"{folder}: its folder `state` is of step {int(loaded.tree['step'])}, its description of step "
            f"{loaded.metadata['step']}; put back what was exchanged, or move the checkpoint away"
        )
    if changed:
        others = f", and so have {len(changed) - 1} other arrays" if len(changed) > 1 else ""
        raise DamagedError(f"{changed[0]} has other bits than were saved{others}")
