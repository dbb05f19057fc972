"""Random numbers of rows: those of a row depend on a name and the row's index only, whatever rows are made with it."""

from __future__ import annotations

import numpy as np

from rwkv_jax.data.tokens.permutation import mix, random_words

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of splitmix64's counter


class Draws:
    """A stream of random numbers for each of n rows (splitmix64); every method takes the next ones of each stream."""

    def __init__(self, name: str, row_index: np.ndarray) -> None:
        """For the rows with these indices, [n] integers; another name gives other streams."""
        self._starts = mix(random_words(name, 1) + row_index.astype(np.uint64) * _GOLDEN)[:, None]
        self._taken = 0

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self._starts)

    def words(self, count: int) -> np.ndarray:
        """`count` words of each row, uint64 [n, count]."""
        counter = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        return mix(self._starts + counter * _GOLDEN)

    def integers(self, high: int, count: int) -> np.ndarray:
        """Uniform integers in [0, high), int64 [n, count]; their bias is below 2^-32 high."""
        return (((self.words(count) >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, count: int) -> np.ndarray:
        """Uniform numbers in (0, 1), float64 [n, count]."""
        return ((self.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def distinct(self, size: int, count: int) -> np.ndarray:
        """`count` different integers of range(size), in random order, int64 [n, count]."""
        return np.argsort(self.words(size), axis=1, kind="stable")[:, :count]

    def distinct_weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """`count` different indices of weights, each drawn by the weights of those that are left, int64 [n, count]."""
        # The first of independent exponential clocks with these rates to ring, then the next one, and so on.
        clocks = -np.log(self.uniform(len(weights))) / weights
        return np.argsort(clocks, axis=1, kind="stable")[:, :count]
