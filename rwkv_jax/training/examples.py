"""Examples of an application: arrays in memory, batches of any step, and means over what is held out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.config.application import ApplicationConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens.permutation import shuffle_epochs
from rwkv_jax.held_out import Measured
from rwkv_jax.parallel.coordination import global_array
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training.state import TrainState

if TYPE_CHECKING:
    from rwkv_jax.training.application import Application
    from rwkv_jax.training.functions import TrainFunctions


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory.

    Raises:
      ConfigError: there are none, or arrays of different numbers of them.
    """

    arrays: Any
    """A NamedTuple of arrays [n, ...], or None; `weight`, float32 [n], is how much each example counts."""
    name: str = "example"
    """What one is called in messages."""
    augment: Callable[[Any, np.random.Generator], Any] | None = None
    """(a row's arrays, random numbers of step and row) -> the row's arrays, of the same shapes; applied in training."""

    def __post_init__(self) -> None:
        sizes = {len(array) for array in jax.tree.leaves(self.arrays)}
        if len(sizes) != 1 or 0 in sizes:
            raise ConfigError(f"examples: arrays of {sorted(sizes)} {self.name}s; each must have as many, and not none")

    def __len__(self) -> int:
        return len(self.arrays.weight)

    def fingerprint(self) -> str:
        """Hex digest of all arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self.arrays._asdict().items():
            if array is not None:
                digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def rows(self, indices: np.ndarray, draws: Callable[[int], np.random.Generator] | None = None) -> Any:
        """Some examples; an index beyond the last is a row that does not count.

        Args:
          draws: from the position in `indices` to the random numbers of `augment`; None leaves it out.
        """
        own = np.minimum(indices, len(self) - 1)
        found = jax.tree.map(lambda array: array[own], self.arrays)
        if self.augment is not None and draws is not None:
            changed = [self.augment(jax.tree.map(lambda x, at=at: x[at], found), draws(at)) for at in range(len(own))]
            found = jax.tree.map(lambda *values: np.stack(values), *changed)
        return found._replace(weight=np.where(indices < len(self), found.weight, 0).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class ApplicationCorpus:
    """What a run asks of its data besides rows, as of a `Corpus`."""

    tokenizer: Tokenizer
    fingerprint: str
    bytes_per_token: float | None = None


@dataclasses.dataclass(eq=False)
class ExampleRows:
    """Batches of any step of an application's run, and of what is held out."""

    application: Application
    training: Examples
    held_out: Examples | None
    functions: TrainFunctions

    @property
    def config(self) -> ApplicationConfig:
        """The run's."""
        return self.application.config

    @property
    def tokens_per_step(self) -> int:
        """Positions that the model reads in a step, if rows have `training.sequence_length` of them."""
        return self.config.training.batch_size * self.config.training.sequence_length

    def use(self, functions: TrainFunctions) -> None:
        """Takes other functions of the same run."""
        assert functions.application is not None  # as these rows are an application's
        self.functions, self.application = functions, functions.application

    def load(self, step: int, params: Any) -> Any:
        """The batch of a step, whatever the parameters are."""
        del params
        seed = self.config.seed

        def draws(row: int) -> np.random.Generator:
            return np.random.default_rng([seed, step, row, 0xE8A])

        return self._batch(self.training, self._order(step), draws)

    def row_locations(self, step: int) -> list[str]:
        """The number of each example of a step, for messages."""
        return [f"{self.training.name} {index}" for index in self._order(step)]

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        size = len(self.training)
        return f"{num_steps * self.config.training.batch_size / size:.2f} epochs of {size:,} {self.training.name}s"

    def prepare(self, state: TrainState, processes: Processes, *, is_new: bool, report: Callable[[str], None]) -> None:
        """There is nothing to prepare."""

    def evaluation(self) -> Callable[[Any, int | None], Measured | None]:
        """Makes (params, number of batches or None for all) -> Measured; None without held-out examples."""
        if self.held_out is None:
            return lambda params, num_batches: None
        held_out, size = self.held_out, self.config.training.batch_size
        eval_step = jax.jit(self.functions.eval_step)

        def evaluate(params: Any, num_batches: int | None) -> Measured:
            starts = range(0, len(held_out), size)[:num_batches]
            # Sums stay on the device until the end, so that batches are dispatched without waiting.
            found = [eval_step(params, self._batch(held_out, np.arange(at, at + size))) for at in starts]
            losses, counts, metrics = zip(*found, strict=True)
            count = sum(map(float, counts))
            means = {name: sum(float(each[name]) for each in metrics) / count for name in metrics[0]}
            decoded = self.application.measure(params, held_out, None if num_batches is None else num_batches * size)
            return Measured(sum(map(float, losses)) / count, means | dict(decoded))

        return evaluate

    def summary(self) -> str | None:
        """Nothing besides what is logged."""
        return None

    def _order(self, step: int) -> np.ndarray:
        size = self.config.training.batch_size
        index = step * size + np.arange(size, dtype=np.int64)
        return shuffle_epochs(index, len(self.training), f"examples {self.config.seed}")

    def _batch(
        self, examples: Examples, indices: np.ndarray, draws: Callable[[int], np.random.Generator] | None = None
    ) -> Any:
        """Examples by index, on the devices; each process makes its own devices' rows."""

        @functools.cache
        def part(start: int, stop: int) -> Any:
            if draws is None:
                return examples.rows(indices[start:stop])
            drawn = draws  # not None in what follows, either
            return examples.rows(indices[start:stop], lambda row: drawn(start + row))

        leaves, structure = jax.tree.flatten(part(0, 1))
        first = leaves[0].shape[1:2]
        placed = []
        for number, leaf in enumerate(leaves):
            of_tokens = leaf.ndim > 1 and leaf.shape[1:2] == first
            sharding = self.functions.tokens_sharding if of_tokens else self.functions.rows_sharding

            def read(rows: slice, number: int = number) -> np.ndarray:
                return jax.tree.leaves(part(rows.start, rows.stop))[number]

            placed.append(global_array(sharding, (len(indices), *leaf.shape[1:]), read))
        return jax.tree.unflatten(structure, placed)
