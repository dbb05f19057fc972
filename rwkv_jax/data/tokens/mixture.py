"""Assigns each row to a source of a mixture: exact shares in every period of rows, in random order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.fingerprint import fingerprint_of
from rwkv_jax.data.tokens.permutation import shuffle_epochs

PERIOD = 2**12
"""Number of rows over which each source has exactly its share."""


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
    """Hex digest of a mixture: of the fingerprints of its sources, and of their rows in a period."""
    return fingerprint_of([list(parts), list(shares)])


def assign_sources(row_index: np.ndarray, shares: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row of a run, and the row's index within that source; both [n] int64.

    Args:
      row_index: rows of the run, counted from 0, [n] int64.
      shares: rows of each source in a period.
      seed: for the order within each period, which differs between periods.
    """
    period, ends = sum(shares), np.cumsum(shares)
    shuffled = shuffle_epochs(row_index, period, f"mixture {seed}")
    sources = np.searchsorted(ends, shuffled, side="right")
    counts = np.asarray(shares, np.int64)[sources]
    return sources, row_index // period * counts + shuffled - (ends[sources] - counts)
