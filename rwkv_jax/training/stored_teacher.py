"""A teacher's most likely tokens for a run's rows, computed once and stored: the run then does without the teacher.

A folder has teacher.json, which says of what rows and teacher it is, and files of the rows of some steps, one after the
other: for each token int32 ids of the k most likely next ones, and float16 log-probabilities of these and of all others
together. (Of 64 of 65,536 tokens, rounded so, the stored probabilities diverge from the teacher's by 2e-7 nats; in
bfloat16 by 1e-5.) Rows are counted by step, so any order of the data has its own.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from rwkv_jax.atomic import replace_file
from rwkv_jax.checkpoint_files import writing
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.json_object import is_unchanged, parse_object, with_digest
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.run_folder import refuse_difference
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.distillation_loss import top_k_of, with_rows
from rwkv_jax.training.loss import split_chunks
from rwkv_jax.training.teacher import TeacherModel, place_teacher, read_teacher, teacher_digest

DESCRIPTION = "teacher.json"
_FILE_BYTES = 2**26
_OF_ROWS = ("corpus", "tokenizer", "seed", "data.", "training.batch_size", "training.sequence_length")
_OF_ROWS += ("training.reset_at_documents", "distillation.teacher")
"""What of a run's identity its rows follow from."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTeacher:
    """What a folder holds; files are memory-mapped."""

    folder: Path
    rows_per_step: int
    """B."""
    steps_per_file: int
    of_row: np.dtype[Any]
    """A row: `ids` [T, k] and `log_p` [T, k + 1]."""
    _opened: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def path(self, number: int) -> Path:
        """The file of steps from number * steps_per_file on."""
        return self.folder / f"{number:08d}.npy"

    def file(self, number: int) -> np.ndarray:
        """A file's rows.

        Raises:
          ConfigError: it is missing or damaged.
        """
        if number in self._opened:
            return self._opened[number]
        path = self.path(number)
        again = "name the teacher, too, and it is computed again"
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: is missing, and the run reads its rows; {again}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); delete it, {again}") from error
        if rows.dtype != self.of_row or rows.shape != (self.steps_per_file * self.rows_per_step,):
            raise ConfigError(f"{path}: has other rows than {DESCRIPTION} says; delete it, {again}")
        self._opened[number] = rows
        return rows

    def read(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """ids [n, T, k] and log_p [n, T, k + 1] of some of a step's rows."""
        number, within = divmod(step, self.steps_per_file)
        first = within * self.rows_per_step
        found = self.file(number)[first + rows.start : first + rows.stop]
        return found["ids"], found["log_p"]


def known_teacher(config: TrainConfig) -> str | None:
    """The digest of a run's teacher: of the one named, or of the one whose predictions are stored; None without one.

    Raises:
      ConfigError: there are no predictions, or they are damaged.
    """
    settings = config.distillation
    if settings.teacher is not None or settings.stored is None:
        return teacher_digest(config)
    return str(_described(Path(settings.stored))["rows"]["distillation.teacher"])


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    label = f"distillation.stored = {str(folder)!r}"
    try:
        content = parse_object(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{label}: holds no predictions ({error.strerror}); name the teacher, too") from error
    if not is_unchanged(content, required=True):
        raise ConfigError(f"{label}: {DESCRIPTION} has changed since it was written; put it back, or name a new folder")
    return content


def check_stored(config: TrainConfig, identity: Mapping[str, Any], processes: Processes) -> None:
    """Refuses stored predictions that a run cannot read, or cannot complete; writes nothing.

    Args:
      identity: the run's, `run_folder.identity`.

    Raises:
      ConfigError: they are of other rows or another teacher, some are damaged, some are missing and no teacher is
        named, or several processes would compute them.
    """
    settings = config.distillation
    if settings.stored is None:
        return
    is_new = settings.teacher is not None and not (Path(settings.stored) / DESCRIPTION).exists()
    if (is_new or _found(config, identity)[1]) and processes.count > 1:
        raise ConfigError(
            f"distillation.stored = {settings.stored!r}: is computed by one process, and there are "
            f"{processes.count}; begin the run with one, then go on with all"
        )


def open_stored(
    config: TrainConfig,
    identity: Mapping[str, Any],
    read: Callable[[int], Batch],
    mesh: Mesh | None,
    processes: Processes,
    report: Callable[[str], None],
) -> StoredTeacher | None:
    """The stored predictions that a run reads; with a teacher, what is missing is computed first.

    Args:
      identity: the run's, `run_folder.identity`.
      read: the batch of a step.

    Raises:
      ConfigError: as `check_stored`.
    """
    settings, training = config.distillation, config.training
    if settings.stored is None:
        return None
    check_stored(config, identity, processes)
    folder = Path(settings.stored)
    if not (folder / DESCRIPTION).exists():
        of_step = training.batch_size * _row_type(config).itemsize
        steps = max(1, min(training.num_steps - training.first_step, _FILE_BYTES // of_step))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            content = with_digest({"rows": _of_rows(config, identity), "steps_per_file": steps})
            replace_file(folder / DESCRIPTION, json.dumps(content, indent=2).encode())
    stored, missing = _found(config, identity)
    if missing:
        _compute(config, stored, missing, read, mesh, report)
    for number in missing:
        stored.file(number)
    return stored


def _found(config: TrainConfig, identity: Mapping[str, Any]) -> tuple[StoredTeacher, list[int]]:
    """What a run's folder holds, and the numbers of files that are missing, for a teacher to compute."""
    settings, training = config.distillation, config.training
    folder = Path(str(settings.stored))
    content = _described(folder)
    refuse_difference(
        content["rows"],
        _of_rows(config, identity),
        str(folder),
        "predictions for another run; take its settings, or name a new folder",
    )
    stored = StoredTeacher(folder, training.batch_size, content["steps_per_file"], _row_type(config))
    needed = range(training.first_step // stored.steps_per_file, -(-training.num_steps // stored.steps_per_file))
    missing = [number for number in needed if settings.teacher is not None and not stored.path(number).exists()]
    for number in needed:
        if number not in missing:
            stored.file(number)
    return stored, missing


def _of_rows(config: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What stored predictions follow from."""
    of_rows = {name: value for name, value in identity.items() if name.startswith(_OF_ROWS)}
    of_rows |= {f"distillation.{name}": getattr(config.distillation, name) for name in ("temperature", "top_k")}
    return of_rows | {f"model.{name}": getattr(config.model, name) for name in ("vocab_size", "dtype")}


def _row_type(config: TrainConfig) -> np.dtype[Any]:
    top_k, length = int(config.distillation.top_k or 0), config.training.sequence_length
    return np.dtype([("ids", "<i4", (length, top_k)), ("log_p", "<f2", (length, top_k + 1))])


def _compute(
    config: TrainConfig,
    stored: StoredTeacher,
    missing: list[int],
    read: Callable[[int], Batch],
    mesh: Mesh | None,
    report: Callable[[str], None],
) -> None:
    """Writes the missing files; one that is there is whole."""
    settings = dataclasses.replace(config.distillation, stored=None)
    teacher = read_teacher(dataclasses.replace(config, distillation=settings), mesh)
    assert teacher is not None
    assert settings.teacher is not None
    here = SingleDeviceSharding(default_device())
    where = (
        jax.tree.map(lambda _: here, teacher.shapes) if mesh is None else shardings(mesh, teacher.sharded.param_specs)
    )
    params = place_teacher(settings.teacher, teacher.config, teacher.shapes, where)
    whole = here if mesh is None else NamedSharding(mesh, PartitionSpec())
    predict = jax.jit(functools.partial(predictions, config, teacher), out_shardings=whole)
    size = stored.steps_per_file * stored.rows_per_step * stored.of_row.itemsize
    report(
        f"the {settings.top_k} most likely tokens of {settings.teacher}: computing {len(missing)} files of "
        f"{size / 1e6:.1f} MB in {stored.folder}; a run that is stopped goes on with the next one"
    )
    for number in missing:
        rows = np.empty((stored.steps_per_file, stored.rows_per_step), stored.of_row)
        for step, of_step in enumerate(rows, start=number * stored.steps_per_file):
            ids, log_p = predict(params, read(step))
            of_step["ids"], of_step["log_p"] = ids, log_p
        buffer = io.BytesIO()
        np.save(buffer, rows.reshape(-1), allow_pickle=False)
        with writing(stored.folder):
            replace_file(stored.path(number), buffer.getvalue())


def predictions(config: TrainConfig, teacher: TeacherModel, params: Any, batch: Batch) -> tuple[Any, Any]:
    """A teacher's most likely tokens in a batch: ids [B, T, k], and log-probabilities [B, T, k + 1] in float16.

    Args:
      config: provides the temperature, k, `loss_chunk`, `accumulation_steps` and the size of the student's vocabulary.
      params: the teacher's.
    """
    settings, sharded, size = config.distillation, teacher.sharded, config.model.vocab_size
    steps = config.training.accumulation_steps

    def local(params: Any, batch: Batch) -> tuple[Any, Any]:
        """Of a device's rows, as many at a time as a step takes: a batch that trains fits here, too."""
        if steps == 1:
            return of_micro_batch(params, batch)
        micro = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), batch)
        found = lax.map(functools.partial(of_micro_batch, params), micro)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    def of_micro_batch(params: Any, batch: Batch) -> tuple[Any, Any]:
        model = teacher.run_model.model(params)
        hidden, _ = model.hidden(
            batch.tokens, segment_ids=batch.segment_ids, axes=sharded.axes, gather_params=sharded.gather_params
        )
        model.gather_head(sharded.gather_params)

        def top_k(hidden: Any) -> Any:
            logits = with_rows(model.logits(hidden), size // sharded.axes.num_tensor_shards)
            return top_k_of(logits / settings.temperature, int(settings.top_k or 0), sharded.axes.tensor)

        flat, chunk = hidden.reshape(-1, hidden.shape[-1]), config.training.loss_chunk
        if chunk is None or chunk >= len(flat):
            found = top_k(flat)
        else:
            pieces = lax.map(lambda piece: top_k(*piece), split_chunks((flat,), chunk))
            found = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[: len(flat)], pieces)
        ids, log_p = (x.reshape(*hidden.shape[:2], -1) for x in found)
        return ids, log_p.astype(jnp.float16)

    specs = (sharded.select_param_specs(params), sharded.batch_specs(batch))
    return sharded.shard_map(local, specs, (sharded.tokens_spec, sharded.tokens_spec))(params, batch)
