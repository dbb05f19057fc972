"""Assigns each row to a source of a mixture: exact shares in every period of rows, in random order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.fingerprint import fingerprint_of
from rwkv_jax.data.tokens.permutation import shuffle_epochs

PERIOD = 2**12
"""Number of rows over which each source has exactly its share."""

_VERSION = 2  # raised when the same mixture would be read in another order


def period_shares(mixture: Sequence[tuple[str, float]]) -> tuple[int, ...]:
    """Rows of each source in a period: normalized weights, rounded so that they fill the period.

    Raises ConfigError for a weight too small for a single row.
    """
    total = sum(weight for _, weight in mixture)
    exact = [weight / total * PERIOD for _, weight in mixture]
    shares = [int(share) for share in exact]
    largest_remainders = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in largest_remainders[: PERIOD - sum(shares)]:
        shares[source] += 1
    for (source, weight), share in zip(mixture, shares, strict=True):
        if share == 0:
            raise ConfigError(
                f"data.mixture, weight of {source!r} = {weight}: less than a row in {PERIOD}; raise it or leave it out"
            )
    return tuple(shares)


def mixture_fingerprint(parts: Sequence[str], shares: Sequence[int]) -> str:
    """Hex digest of a mixture: of its order, the fingerprints of its sources, and their rows in a period."""
    return fingerprint_of([_VERSION, list(parts), list(shares)])


def assign_sources(row_index: np.ndarray, shares: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row of a run, and how many rows of that source come before it; both [n] int64.

    Args:
      row_index: rows of the run, counted from 0, [n] int64.
      shares: rows of each source in a period.
      seed: for the order within each period, which differs between periods.
    """
    periods, positions = np.divmod(row_index, sum(shares))
    sources, members = np.empty_like(row_index), np.empty_like(row_index)
    for period in np.unique(periods).tolist():
        chosen = periods == period
        of_period = _period_order(period, tuple(shares), seed)
        sources[chosen], members[chosen] = (each[positions[chosen]] for each in of_period)
    return sources, members


@functools.lru_cache(maxsize=8)  # the steps that are read in turn share a period, which is 64 KiB
def _period_order(period: int, shares: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`assign_sources` of all rows of a period."""
    size, counts, ends = sum(shares), np.asarray(shares, np.int64), np.cumsum(shares)
    shuffled = shuffle_epochs(period * size + np.arange(size, dtype=np.int64), size, f"mixture {seed}")
    sources = np.searchsorted(ends, shuffled, side="right")
    ranks = np.empty_like(sources)
    ranks[np.argsort(sources, kind="stable")] = np.arange(size) - np.repeat(ends - counts, counts)
    return sources, period * counts[sources] + ranks
