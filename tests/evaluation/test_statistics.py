"""Estimates against formulas, brute force and cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rwkv_jax.evaluation.statistics import (
    bits,
    bootstrap,
    estimate,
    perplexity,
    pooled_standard_error,
    standard_error,
)

VALUES = [float(value) for value in np.random.default_rng(0).normal(-3, 2, size=200)]


def test_standard_errors_are_those_of_numpy() -> None:
    assert standard_error(VALUES) == pytest.approx(np.std(VALUES, ddof=1) / math.sqrt(len(VALUES)), rel=1e-12)
    assert standard_error(VALUES[:1]) is None


def test_groups_count_by_the_variance_within_them() -> None:
    groups = ["a", "a", "b", "b", "b", "c"]
    values = [1.0, 0.0, 11.0, 10.0, 12.0, 50.0]
    within = (0.5 + 2.0) / (6 - 3)  # sums of squares by degrees of freedom
    assert pooled_standard_error(values, groups) == pytest.approx(math.sqrt(within / 6), rel=1e-12)
    assert pooled_standard_error(values, ["same"] * 6) == pytest.approx(standard_error(values), rel=1e-12)
    assert pooled_standard_error(values, list("abcdef")) is None


def test_a_bootstrap_of_a_mean_spreads_as_the_formula_says() -> None:
    drawn = bootstrap(VALUES, [1.0] * len(VALUES), draws=4000, seed=1)
    assert np.mean(drawn) == pytest.approx(np.mean(VALUES), abs=0.02)
    error = standard_error(VALUES)
    assert error is not None
    assert np.std(drawn) == pytest.approx(error, rel=0.06)
    result = estimate(VALUES)
    assert result.low == pytest.approx(result.value - 1.96 * error, abs=0.03)
    assert result.high == pytest.approx(result.value + 1.96 * error, abs=0.03)
    assert result == estimate(VALUES), "draws are seeded"


def test_a_ratio_is_resampled_with_its_weights() -> None:
    weights = [float(weight) for weight in np.random.default_rng(2).integers(5, 50, size=len(VALUES))]
    sums = [value * weight for value, weight in zip(VALUES, weights, strict=True)]
    result = estimate(sums, weights, bits)
    assert result.value == pytest.approx(-sum(sums) / sum(weights) / math.log(2), rel=1e-12)
    # Delta method: the residuals of a ratio.
    ratio = sum(sums) / sum(weights)
    residuals = [a - ratio * b for a, b in zip(sums, weights, strict=True)]
    expected = np.std(residuals, ddof=1) / math.sqrt(len(residuals)) / np.mean(weights) / math.log(2)
    assert result.stderr == pytest.approx(expected, rel=0.12)
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.value < result.high


def test_resampling_stays_within_groups() -> None:
    drawn = bootstrap([0.0] * 5 + [9.0] * 5, [1.0] * 10, groups=["a"] * 5 + ["b"] * 5, draws=50)
    assert set(drawn) == {4.5}


def test_edges() -> None:
    assert estimate([0.25]) == (0.25, None, None, None, 1)
    assert estimate([1.0, 1.0]) == (1.0, 0.0, 1.0, 1.0, 2)
    assert perplexity(-2.0) == pytest.approx(math.exp(2))
    assert perplexity(-1e6) == math.inf
    assert estimate([-1e6, -2e6], None, perplexity) == (math.inf, None, None, None, 2)
