"""Means over items with their uncertainty: standard errors and bootstrap intervals. Pure Python and NumPy.

Every metric of the tasks is a function of a ratio of sums over items, sum(values) / sum(weights): an accuracy is it,
a perplexity is exp of its negative, bits per byte are its negative / log 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
"""Resamples of a bootstrap."""
_VALUES_AT_A_TIME = 2**21


class Estimate(NamedTuple):
    """A metric over items."""

    value: float
    stderr: float | None
    """Standard error; None for a single item, and where resampled values are infinite."""
    low: float | None
    """Lower end of the 95% interval of a percentile bootstrap over items; None as `stderr`."""
    high: float | None
    """Upper end."""
    count: int
    """Number of items."""


def mean_of(value: float) -> float:
    """The ratio itself."""
    return value


def perplexity(mean_logprob: float) -> float:
    """exp of the mean negative log-probability; infinite where that is out of range."""
    try:
        return math.exp(-mean_logprob)
    except OverflowError:
        return math.inf


def bits(mean_logprob: float) -> float:
    """Bits from a mean log-probability in nats."""
    return -mean_logprob / math.log(2)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean: the sample's standard deviation (n - 1) by the root of n; None for a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def pooled_standard_error(values: Sequence[float], groups: Sequence[str]) -> float | None:
    """Standard error of a mean over groups that are given, not drawn: only the variance within them counts.

    As lm-eval's for groups of tasks; None if no group has two values.
    """
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    freedom = len(values) - len(members)
    if freedom < 1:
        return None
    squares = sum((value - sum(own) / len(own)) ** 2 for own in members.values() for value in own)
    return math.sqrt(squares / freedom / len(values))


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float],
    transform: Callable[[float], float] = mean_of,
    *,
    groups: Sequence[str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """The metric of resampled items, float64 [draws]: items are drawn with replacement, within their group.

    Args:
      transform: from the ratio of sums to the metric.
    """
    a, b = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    names = np.zeros(len(a), int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    generator = np.random.default_rng(seed)
    sums = np.zeros((draws, 2))
    for group in range(int(names.max()) + 1):
        own_a, own_b = a[names == group], b[names == group]
        rows = max(1, _VALUES_AT_A_TIME // len(own_a))
        for start in range(0, draws, rows):
            chosen = generator.integers(len(own_a), size=(min(rows, draws - start), len(own_a)))
            sums[start : start + rows, 0] += own_a[chosen].sum(axis=1)
            sums[start : start + rows, 1] += own_b[chosen].sum(axis=1)
    return np.array([transform(float(ratio)) for ratio in sums[:, 0] / sums[:, 1]])


def estimate(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    transform: Callable[[float], float] = mean_of,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate:
    """A metric with its standard error, of a plain mean by the formula and of others by bootstrap, and its interval.

    Args:
      values: one of each item, at least one.
      weights: as many, such as bytes; None counts items.
      transform: as in `bootstrap`.
      groups: the group of each item, where groups are given rather than drawn, such as subjects.
    """
    given = [1.0] * len(values) if weights is None else list(weights)
    value = transform(sum(values) / (len(values) if weights is None else sum(given)))
    if len(values) < 2:
        return Estimate(value, None, None, None, len(values))
    drawn = bootstrap(values, given, transform, groups=groups, seed=seed)
    if not np.isfinite(drawn).all():
        return Estimate(value, None, None, None, len(values))
    low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
    if weights is None and transform is mean_of:
        stderr = standard_error(values) if groups is None else pooled_standard_error(values, groups)
    else:
        stderr = float(np.std(drawn, ddof=1))
    return Estimate(value, stderr, low, high, len(values))
