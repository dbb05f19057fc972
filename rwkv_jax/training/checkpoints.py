"""Checkpoints by Orbax: written in the background, whole or not at all, restored into the present shardings.

A run folder holds

    run.json        what the run is: its config, and the fingerprints of its corpus and tokenizer
    tokenizer.model the tokenizer, so that the run can be sampled from when the corpus is gone; a given tokenizer.json
                    keeps that name, World and bytes are a tokenizer.kind.json
    checkpoints/    the newest steps, named by the number of steps taken
    best/           the step with the lowest held-out loss
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from rwkv_jax.atomic import replace_file
from rwkv_jax.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig, from_dict, to_dict
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.data.tokens.token_file import Corpus
from rwkv_jax.parallel.coordination import allgather_text, differences
from rwkv_jax.parallel.processes import DisagreementError, Processes
from rwkv_jax.tables import format_table
from rwkv_jax.training.step import TrainState, abstract_state, make_train_functions

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
BEST = "best"


def identity(config: TrainConfig, corpus_fingerprint: str, tokenizer_fingerprint: str) -> dict[str, Any]:
    """What must not change between a run and its resumption, by field: the model and all that orders the data.

    Compute dtype and operator implementation are left out: they change rounding, not what the parameters mean. So are
    the room of a Transformer's state, which training has none of, and the number of steps, so that a run can be made
    longer.
    """
    model = dataclasses.asdict(config.model.resolved())
    others = ("dtype", "wkv_implementation", "context_length")
    return {f"model.{name}": value for name, value in model.items() if name not in others} | {
        "initial_weights": config.initial_weights,
        "seed": config.seed,
        "data.order": config.data.order,  # a mixture is the corpus's
        "data.magic_prime": config.data.magic_prime,
        "training.batch_size": config.training.batch_size,
        "training.sequence_length": config.training.sequence_length,
        "training.reset_at_documents": config.training.reset_at_documents,
        "training.carry_state": config.training.carry_state,
        "corpus": corpus_fingerprint,
        "tokenizer": tokenizer_fingerprint,
    }


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting that the processes of one run must share, by field."""

    def flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        fields = {}
        for name, value in values.items():
            fields |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        return fields

    fields = flat(to_dict(config), "")
    for own in ("distributed.process_id", "data.cache_dir"):  # hosts may have disks of their own
        del fields[own]
    return fields


def refuse_difference(saved: Mapping[str, Any], present: Mapping[str, Any], place: str) -> None:
    """Raises ConfigError with a table of the fields in which a saved identity and the present one differ."""
    names = sorted(saved.keys() | present.keys())
    rows = [(name, str(saved.get(name, "-")), str(present.get(name, "-"))) for name in names]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return
    rows.insert(0, ("field", "saved", "now"))
    table = format_table(rows, "<<<")
    raise ConfigError(f"{place} holds another run; use its settings to resume it, or name another run_dir:\n{table}")


def prepare_run_dir(run_dir: Path) -> dict[str, Any] | None:
    """Makes sure that a run can live in a folder, before any work is done.

    Returns:
      The content of its run.json, or None for a new run.

    Raises:
      ConfigError: the folder cannot be written, or holds things that are no run's.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Processes on several hosts may all have the same number, so the name is drawn.
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".write-test-"):
            pass
    except OSError as error:
        raise ConfigError(f"run_dir = {str(run_dir)!r}: cannot be written ({error}); name another folder") from error
    run_file = run_dir / RUN_FILE
    if run_file.exists():
        return read_run_file(run_dir)
    foreign = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("."))
    if foreign:
        raise ConfigError(
            f"run_dir = {str(run_dir)!r}: holds {foreign[0]!r} but no {RUN_FILE}, so it is no run of ours; "
            "name a new or empty folder"
        )
    return None


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
      ConfigError: it is missing or damaged.
    """
    path = run_dir / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.keys() >= {"config", "identity"}:
            raise KeyError("config or identity is missing")
    except FileNotFoundError as error:
        raise ConfigError(f"{str(run_dir)!r}: is no run folder, it has no {RUN_FILE}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read as a run's description ({error})") from error
    return content


def write_run(run_dir: Path, config: TrainConfig, run_identity: Mapping[str, Any], corpus: Corpus) -> None:
    """Writes run.json, without which the folder would be taken for no run's, then the tokenizer."""
    content = {"config": to_dict(config), "identity": dict(run_identity)}
    replace_file(run_dir / RUN_FILE, json.dumps(content, indent=2).encode())
    tokenizer = corpus.tokenizer.saved
    replace_file(run_dir / tokenizer.name, tokenizer.content)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves in flight.

    Of a run of several processes, all call each method; the first alone renames, and what it finds is true for all.
    """

    def __init__(
        self, run_dir: Path, keep: int, report: Callable[[str], None], processes: Processes | None = None
    ) -> None:
        self._report, self._processes = report, processes or Processes()
        self._latest = _open(run_dir / CHECKPOINTS, keep)
        self._best = _open(run_dir / BEST, 1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._latest.close()
        self._best.close()

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole for every process, or None if there is none.

        A damaged one is moved aside (its folder gets the prefix `damaged-`), said so, and the one before is tried.

        Args:
          like: shapes, dtypes and the shardings to restore into.

        Raises:
          DisagreementError: the processes see different checkpoints.
        """
        for step in self._steps():
            state, reason = None, ""
            try:
                state = _load_alone(Path(str(self._latest.directory)) / str(step), like, self._processes)
            except Exception as error:  # Whatever a damaged file makes of Orbax, an older one may be whole.
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            # Each process reads its own share, and one share may be damaged where the others are whole.
            reasons = allgather_text(self._processes, f"what checkpoint {step} holds", reason)
            if not any(reasons):
                return state
            self._set_aside(step, next(filter(None, reasons)))
        return None

    def _steps(self) -> list[int]:
        """Steps of the checkpoints that there are, newest first."""
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
        self._latest.reload()  # or Orbax believes that the step is still there, and it is never saved again

    def best_loss(self) -> float:
        """Held-out loss of the best checkpoint; infinity if there is none, or only a damaged one."""
        metadata: Any = None
        if (latest := self._best.latest) is not None:
            # Whatever a damaged file makes of Orbax, a better checkpoint will take its place.
            with contextlib.suppress(Exception):
                metadata = self._best.metadata(latest.step).custom_metadata
        loss = float(metadata["held_out_loss"]) if metadata else math.inf
        return float(allgather_text(self._processes, "best loss", repr(loss))[0])

    def save(self, state: TrainState, step: int) -> None:
        """Starts to write a checkpoint; a step that is there already stays as it is."""
        # A run that is killed now must not go on after an evaluation whose best checkpoint was never finished.
        self._best.wait()
        _save(self._latest, state, step, {})

    def save_best(self, state: TrainState, step: int, held_out_loss: float) -> None:
        """Starts to write the best checkpoint, which replaces the one before."""
        _save(self._best, state, step, {"held_out_loss": held_out_loss})

    def wait(self) -> None:
        """Waits until all that was saved is on disk."""
        self._latest.wait()
        self._best.wait()


class LoadedModel(NamedTuple):
    """A trained model."""

    config: TrainConfig
    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model."""
    params: Any
    step: int
    """Steps that it was trained for."""


def load_run_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
      ConfigError: this is no run, or its tokenizer is another one now.
    """
    run = read_run_file(run_dir)
    tokenizer = load_tokenizer(run_dir, from_dict(run["config"]).model.vocab_size)
    if tokenizer.fingerprint != run["identity"].get("tokenizer", tokenizer.fingerprint):
        raise ConfigError(
            f"{run_dir / tokenizer.saved.name}: has changed since the run was begun; put back the file that was there"
        )
    return tokenizer


def load_model(
    run_dir: Path, which: Literal["newest", "best"], shardings: Callable[[ModelConfig], Any] | None = None
) -> LoadedModel:
    """The model of a run's newest or best checkpoint; nothing else of the checkpoint is read.

    Args:
      shardings: from the model's config to a nested dict of where each parameter goes; None is the first device.

    Raises:
      ConfigError: this is no run, it has no such checkpoint, or that is damaged.
    """
    config = from_dict(read_run_file(run_dir)["config"])
    trainer = make_train_functions(dataclasses.replace(config, parallel=ParallelConfig()))
    like = _as_tree(abstract_state(trainer))
    if shardings is not None:
        like["params"] = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            like["params"],
            shardings(config.model),
        )
    folder = run_dir / (BEST if which == "best" else CHECKPOINTS)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: holds no checkpoint yet; train the run first")
    with _open(folder, None) as checkpointer:
        if checkpointer.latest is None:
            raise ConfigError(f"{folder}: holds no checkpoint yet; train the run first")
        step = checkpointer.latest.step
        template = {name: jax.tree.map(lambda _: ocp.PLACEHOLDER, part) for name, part in like.items()}
        try:
            params = checkpointer.load(step, template | {"params": like["params"]})["params"]
        except Exception as error:  # Whatever a damaged file makes of Orbax, the user needs the place and the remedy.
            raise ConfigError(f"{folder / str(step)}: cannot be read ({error}); resume the run to mend it") from error
    return LoadedModel(config, trainer.graphdef, params, step)


def _open(folder: Path, keep: int | None) -> ocp.training.Checkpointer:
    policies: Any = ocp.training.preservation_policies  # Orbax's own annotations do not agree with each other
    every_time: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
        save_decision_policy=every_time,
        cleanup_tmp_directories=keep is not None,
    )


def _as_tree(state: TrainState) -> dict[str, Any]:
    """A plain dict of what is there, so that the files do not depend on our class."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def _save(checkpointer: ocp.training.Checkpointer, state: TrainState, step: int, metadata: dict[str, Any]) -> None:
    if any(checkpoint.step == step for checkpoint in checkpointer.checkpoints):
        return
    # The caller's next step reuses these buffers, and on a CPU Orbax writes from the very buffers it is given.
    state = jax.tree.map(jnp.copy, state)
    checkpointer.save_async(step, _as_tree(state), force=True, custom_metadata=metadata)


def _load_alone(folder: Path, like: TrainState, processes: Processes) -> TrainState:
    """A checkpoint, of which this process reads its own devices' share without waiting for the others.

    Orbax would let them wait at a barrier for a process whose share is damaged.
    """
    context = ocp.Context()
    alone: Any = context.multiprocessing
    alone.primary_host, alone.active_processes = processes.index, {processes.index}
    alone.barrier_sync_key_prefix = f"process_{processes.index}"
    with context:
        return TrainState(**ocp.load(str(folder), _as_tree(like)))
