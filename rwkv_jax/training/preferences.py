"""What a run on preferences has besides its objective: batches of pairs, stored log-probabilities, evaluation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.atomic import replace_file
from rwkv_jax.config import WITH_REFERENCE, ConfigError, TrainConfig
from rwkv_jax.data.preference.pairs import PairCorpus, PairRows, Pairs
from rwkv_jax.held_out import Measured
from rwkv_jax.parallel.coordination import global_array
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.objectives.preference import PairBatch, Preference, Replies
from rwkv_jax.training.state import TrainState
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.pretrained import weights_for
from rwkv_jax.weights.sources import find_weights

REFERENCE_FILE = "reference.npz"
"""In the run's folder: log-probabilities under the reference model, and the digests of what they are of."""


class Reference(NamedTuple):
    """Log-probabilities of all replies under the reference model; float32 [examples, 2], first and second replies."""

    training: np.ndarray
    held_out: np.ndarray | None


@dataclasses.dataclass(eq=False)
class PreferenceRows:
    """Batches of any step of a run, and of its held-out pairs."""

    corpus: PairCorpus
    config: TrainConfig
    functions: TrainFunctions
    reference: Reference | None = None
    """Set before the first batch if the objective compares with stored log-probabilities."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the model reads in a step: those of both rows of each pair."""
        return 2 * self.config.training.batch_size * self.config.training.sequence_length

    def use(self, functions: TrainFunctions) -> None:
        """Takes other functions of the same run."""
        self.functions = functions

    def load(self, step: int, params: Any) -> PairBatch:
        """The batch of a step, whatever the parameters are."""
        del params
        training = self.config.training
        order = self.corpus.order(step, batch_size=training.batch_size, seed=self.config.seed)
        return self._batch(self.corpus.training, order, None if self.reference is None else self.reference.training)

    def held_out_batches(self, num_batches: int | None) -> list[Callable[[], PairBatch]]:
        """Loaders of the held-out pairs in order, of which the last batch may be filled up."""
        assert self.corpus.held_out is not None
        reference = None if self.reference is None else self.reference.held_out
        return self._in_order(self.corpus.held_out, reference)[:num_batches]

    def row_locations(self, step: int) -> list[str]:
        """File and line of each pair of a step, for messages."""
        training = self.config.training
        order = self.corpus.order(step, batch_size=training.batch_size, seed=self.config.seed)
        return [self.corpus.training.examples[index].place for index in order]

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        size, training = len(self.corpus.training), self.config.training
        return f"{num_steps * training.batch_size / size:.2f} epochs of {size:,} pairs or labeled replies"

    def prepare(self, state: TrainState, processes: Processes, *, is_new: bool, report: Callable[[str], None]) -> None:
        """Takes the reference: of the model with which a new run begins, or as the run has stored it.

        Raises:
          ConfigError: as `read_reference`.
        """
        config, run_dir = self.config, Path(self.config.run_dir)
        if config.training.objective not in WITH_REFERENCE or config.preference.reference != "stored":
            return
        assert config.initial_weights is not None  # as the config has checked
        weights = weights_for(find_weights(config.initial_weights), config.model, warn=False)
        digests = {"data": self.corpus.fingerprint, "base": weights_digest(weights.tensors)}
        del weights
        if not is_new:
            self.reference = read_reference(run_dir, digests)
            return
        self.reference = self.compute_reference(state.params)
        report(
            f"log-probabilities under {config.initial_weights}: computed for {len(self.reference.training)} to train on"
        )
        if processes.is_first:
            write_reference(run_dir, self.reference, digests)

    def evaluation(self) -> Callable[[Any, int | None], Measured | None]:
        """Makes (params, number of batches or None for all) -> Measured; None without held-out pairs."""
        if self.corpus.held_out is None:
            return lambda params, num_batches: None
        eval_step = jax.jit(self.functions.eval_step)

        def evaluate(params: Any, num_batches: int | None) -> Measured:
            # Sums stay on the device until the end, so that batches are dispatched without waiting.
            found = [eval_step(params, load()) for load in self.held_out_batches(num_batches)]
            losses, counts, metrics = zip(*found, strict=True)
            count = sum(map(float, counts))
            means = {name: sum(float(each[name]) for each in metrics) / count for name in metrics[0]}
            return Measured(sum(map(float, losses)) / count, means)

        return evaluate

    def summary(self) -> str | None:
        """Nothing besides what is logged."""
        return None

    def compute_reference(self, params: Any) -> Reference:
        """Log-probabilities of all replies under a model."""
        objective = self.functions.objective
        assert isinstance(objective, Preference)
        sharded = self.functions.sharded

        def local(params: Any, batch: PairBatch) -> Any:
            found = jnp.stack([reply.total for reply in objective.log_p_of(params, batch)], axis=1)
            # Devices that split time have the same sums.
            return found if sharded.axes.sequence is None else lax.pmax(found, sharded.axes.sequence)

        def both(params: Any, batch: PairBatch) -> Any:
            specs = (sharded.select_param_specs(params), sharded.batch_specs(batch))
            found = sharded.shard_map(local, specs, sharded.rows_spec)(params, batch)
            return found.astype(jnp.float32)

        run = jax.jit(both, out_shardings=self.functions.state_shardings.step)

        def of(pairs: Pairs) -> np.ndarray:
            found = [np.asarray(run(params, load())) for load in self._in_order(pairs, None)]
            return np.concatenate(found)[: len(pairs)]

        held_out = self.corpus.held_out
        return Reference(of(self.corpus.training), None if held_out is None else of(held_out))

    def _in_order(self, pairs: Pairs, reference: np.ndarray | None) -> list[Callable[[], PairBatch]]:
        size = self.config.training.batch_size
        starts = range(0, len(pairs), size)
        return [functools.partial(self._batch, pairs, np.arange(at, at + size), reference) for at in starts]

    def _batch(self, pairs: Pairs, indices: np.ndarray, reference: np.ndarray | None) -> PairBatch:
        """Examples by index, on the devices; each process makes its own devices' rows."""
        training = self.config.training
        shape = (training.batch_size, training.sequence_length)
        labels, made = pairs.labels, dict[tuple[int, int], PairBatch]()

        def taken(values: np.ndarray, own: np.ndarray) -> np.ndarray:
            return values[np.minimum(own, len(values) - 1)]  # what fills up the batch does not count

        def part(rows: slice) -> PairBatch:
            if (rows.start, rows.stop) not in made:
                own = indices[rows]
                first, second = pairs.rows(own.tolist())
                columns = (None, None) if reference is None else tuple(taken(reference, own).T)
                made[rows.start, rows.stop] = PairBatch(
                    _replies(first, columns[0]),
                    _replies(second, columns[1]),
                    (own < len(pairs)).astype(np.float32),
                    None if labels is None else taken(labels, own),
                )
            return made[rows.start, rows.stop]

        example = part(slice(0, 1))
        leaves, structure = jax.tree.flatten(example)
        placed = []
        for number, leaf in enumerate(leaves):
            sharding = self.functions.tokens_sharding if leaf.ndim == 2 else self.functions.rows_sharding

            def read(rows: slice, number: int = number) -> np.ndarray:
                return jax.tree.leaves(part(rows))[number]

            placed.append(global_array(sharding, shape[: leaf.ndim], read))
        return jax.tree.unflatten(structure, placed)


def _replies(rows: PairRows, reference: Any) -> Replies:
    return Replies(*rows, reference)


def write_reference(run_dir: Path, reference: Reference, digests: Mapping[str, str]) -> None:
    """Stores a reference with the digests of what it was computed from."""
    arrays: dict[str, Any] = {"training": reference.training}
    if reference.held_out is not None:
        arrays["held_out"] = reference.held_out
    content = {**digests, "values": _digest_of(arrays)}
    buffer = io.BytesIO()
    np.savez(buffer, of=np.frombuffer(json.dumps(content).encode(), np.uint8), **arrays)
    replace_file(run_dir / REFERENCE_FILE, buffer.getvalue())


def read_reference(run_dir: Path, digests: Mapping[str, str]) -> Reference:
    """Reads a reference.

    Args:
      digests: of the data and the base that the run has now, by name.

    Raises:
      ConfigError: the file is missing or damaged, or its data or base is another one.
    """
    path = run_dir / REFERENCE_FILE
    again = "put it back, or begin the run again with --restart"
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays.pop("of").tobytes())
        if told["values"] != _digest_of(arrays):
            raise ValueError("its values have changed")
        reference = Reference(arrays["training"], arrays.get("held_out"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the reference's log-probabilities are missing; {again}") from error
    except Exception as error:  # whatever NumPy and zipfile raise for a damaged file
        raise ConfigError(f"{path}: cannot be read as a reference's log-probabilities ({error}); {again}") from error
    for name, digest in digests.items():
        if told.get(name) != digest:
            raise ConfigError(
                f"{path}: was computed with {name} of the digest {told.get(name)}, and the run has {digest} now; put "
                f"that back, or begin the run again with --restart"
            )
    return reference


def _digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return digest.hexdigest()
