"""The shares of a mixture are exact in each period, and each source gives its rows in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokens.mixture import PERIOD, assign_sources, mixture_fingerprint, period_shares


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1.0,), (4096,)),
        ((1.0, 1.0), (2048, 2048)),
        ((3.0, 1.0), (3072, 1024)),
        ((0.7, 0.3), (2867, 1229)),
        ((1.0, 1.0, 1.0), (1366, 1365, 1365)),
        ((1e-300, 1e-300), (2048, 2048)),
        ((4095.0, 1.0), (4095, 1)),
    ],
)
def test_shares_are_the_weights_rounded(weights: tuple[float, ...], shares: tuple[int, ...]) -> None:
    assert period_shares([(str(index), weight) for index, weight in enumerate(weights)]) == shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_shares_fill_the_period_and_are_off_by_less_than_a_row(weights: list[float]) -> None:
    try:
        shares = period_shares([(str(index), weight) for index, weight in enumerate(weights)])
    except ConfigError:
        assert min(weights) / sum(weights) < 1 / PERIOD
        return
    assert sum(shares) == PERIOD
    exact = np.array(weights) / sum(weights) * PERIOD
    assert (np.abs(np.array(shares) - exact) < 1).all()


def test_a_weight_too_small_for_a_row_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data.mixture, weight of 'b' = 0.1: less than a row in 4096"):
        period_shares([("a", 1000.0), ("b", 0.1)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_shares_are_exact_and_each_source_is_read_in_order(shares: list[int], seed: int, first_period: int) -> None:
    period = sum(shares)
    row_index = first_period * period + np.arange(3 * period)
    sources, members = assign_sources(row_index, shares, seed)
    for source, share in enumerate(shares):
        for number in range(3):
            assert (sources[number * period : (number + 1) * period] == source).sum() == share
        expected = first_period * share + np.arange(3 * share)
        assert members[sources == source].tolist() == expected.tolist()


def test_each_element_is_found_alone() -> None:
    row_index = np.arange(3 * PERIOD)
    shares = period_shares([("a", 0.7), ("b", 0.3)])
    sources, members = assign_sources(row_index, shares, 3)
    for element in (0, 1, 4095, 4096, 9000):
        one = assign_sources(np.array([element]), shares, 3)
        assert (int(one[0][0]), int(one[1][0])) == (int(sources[element]), int(members[element]))


def test_sources_are_spread_over_the_period_and_periods_differ() -> None:
    shares = period_shares([("a", 0.5), ("b", 0.5)])
    sources, _ = assign_sources(np.arange(2 * PERIOD), shares, 0)
    quarters = sources[:PERIOD].reshape(4, -1).mean(axis=1)
    assert (np.abs(quarters - 0.5) < 0.06).all()
    assert 0.4 < np.mean(sources[:PERIOD] == sources[PERIOD:]) < 0.6
    other, _ = assign_sources(np.arange(PERIOD), shares, 1)
    assert 0.4 < np.mean(sources[:PERIOD] == other) < 0.6


def test_the_order_of_a_mixture_never_changes() -> None:
    sources, members = assign_sources(np.arange(5000, 5008), (3072, 1024), 7)
    assert (sources.tolist(), members.tolist()) == (
        [0, 0, 1, 0, 0, 0, 0, 0],
        [3743, 3744, 1257, 3745, 3746, 3747, 3748, 3749],
    )


def test_the_fingerprint_of_a_mixture_never_changes() -> None:
    digest = "d9cb1e9b5fa6ffeb516be7abf9a23305"
    assert mixture_fingerprint(["first", "second"], (3072, 1024)) == digest
    others = [(["second", "first"], (3072, 1024)), (["first", "second"], (1024, 3072)), (["first"], (3072, 1024))]
    assert digest not in {mixture_fingerprint(parts, shares) for parts, shares in others}
    # Runs that began before each source was read in order have this one, and do not go on in another order.
    assert digest != "276efbe3d1cea73c39dbb222b8d247ea"
