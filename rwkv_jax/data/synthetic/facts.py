"""Facts that never change, of which a few are told often and many seldom: what is learned of them is in the weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from rwkv_jax.data.synthetic.draws import Draws
from rwkv_jax.data.synthetic.task import BEGIN, BLANK, SIGNS, Task
from rwkv_jax.data.tokens.permutation import random_words
from rwkv_jax.data.tokens.rows import Rows


@dataclasses.dataclass(frozen=True)
class Facts(Task):
    """Keys, each with a value that is its own in every row; the key of rank r comes with a probability like r^-power.

    Only the first time that a row has a key counts, since the row answers it afterwards. Evaluated besides on keys of
    ranks 0 to 3, 4 to 15, 16 to 63 and so on, among each other as likely as in the whole.

    Chance: one of all values. (That some value belongs to more keys than others is knowledge of facts, too.)
    """

    name: ClassVar[str] = "facts"

    num_facts: int = 1024
    """Keys, by rank: k0 is the most frequent."""
    num_values: int = 32
    """Values that keys have, drawn for each key once and for all."""
    power: float = 1.0
    """Of Zipf's law; 0 makes all facts equally frequent."""
    ranks: tuple[int, ...] = ()
    """First rank, and the one after the last; () are all."""

    def __post_init__(self) -> None:
        self.require_positive("num_facts", "num_values")
        self.require(0 <= self.power < np.inf, "power", "must not be negative")
        is_range = not self.ranks or (len(self.ranks) == 2 and 0 <= self.ranks[0] < self.ranks[1] <= self.num_facts)
        self.require(is_range, "ranks", f"must be two ascending ranks from 0 to num_facts = {self.num_facts}, or ()")

    @property
    @override
    def symbols(self) -> tuple[str, ...]:
        keys, values = (f"k{number}" for number in range(self.num_facts)), (f"v{n}" for n in range(self.num_values))
        return (*SIGNS, *keys, *values)

    @property
    @override
    def min_length(self) -> int:
        return 2

    @property
    def values(self) -> np.ndarray:
        """The value of every key, int64 [num_facts] in [0, num_values); those of more facts begin with the same."""
        words = _words_of_facts(self.num_facts)
        return ((words * np.uint64(self.num_values)) >> np.uint64(32)).astype(np.int64)

    @property
    def probabilities(self) -> np.ndarray:
        """Of each key to be the next one, float64 [num_facts]."""
        first, end = self.ranks or (0, self.num_facts)
        rank = np.arange(self.num_facts)
        weights = np.where((rank >= first) & (rank < end), (1.0 + rank) ** -self.power, 0.0)
        return weights / weights.sum()

    @override
    def rows(self, draws: Draws, length: int) -> Rows:
        count = length // 2
        ends = np.cumsum(self.probabilities)
        keys = np.minimum(np.searchsorted(ends, draws.uniform(count) * ends[-1], side="right"), self.num_facts - 1)
        tokens = np.full((draws.num_rows, length + 1), BLANK)
        tokens[:, 0] = BEGIN
        tokens[:, 1 : 2 * count : 2] = len(SIGNS) + 1 + keys
        tokens[:, 2 : 2 * count + 1 : 2] = len(SIGNS) + 1 + self.num_facts + self.values[keys]
        is_same = keys[:, :, None] == keys[:, None, :]
        mask = np.zeros((draws.num_rows, length), np.float32)
        mask[:, 1 : 2 * count : 2] = ~np.tril(is_same, -1).any(axis=-1)
        return Rows(tokens.astype(np.int32), mask)

    @override
    def chance(self, length: int) -> float:
        return 1 / self.num_values

    @override
    def variants(self) -> Mapping[str, Task]:
        if self.ranks:
            return {}
        edges = [0]
        while edges[-1] < self.num_facts:
            edges.append(min(self.num_facts, 4 * max(1, edges[-1])))
        return {
            f"ranks_{first}_{end - 1}": dataclasses.replace(self, ranks=(first, end))
            for first, end in itertools.pairwise(edges)
        }


@functools.cache
def _words_of_facts(count: int) -> np.ndarray:
    """Random uint64 numbers below 2^32 that depend on nothing; more of them begin with the same."""
    return random_words("values of facts", count) >> np.uint64(32)
