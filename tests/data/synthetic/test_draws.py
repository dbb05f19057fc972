"""Random numbers of rows: the same whatever rows are made together, and distributed as they say."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from rwkv_jax.data.synthetic.draws import Draws

MANY = np.arange(40_000)


def test_a_row_has_the_same_numbers_whatever_rows_are_made_with_it() -> None:
    every, some = Draws("a", np.arange(100)), Draws("a", np.array([7, 3, 99]))
    for draw in (
        lambda draws: draws.integers(1000, 3),
        lambda draws: draws.distinct(9, 4),
        lambda draws: draws.uniform(2),
        lambda draws: draws.distinct_weighted(np.array([1.0, 2.0, 3.0]), 2),
        lambda draws: draws.words(2),
    ):
        np.testing.assert_array_equal(draw(every)[[7, 3, 99]], draw(some))


def test_rows_names_and_calls_have_different_numbers() -> None:
    draws = Draws("a", np.arange(2000))
    first, second, other = draws.words(2), draws.words(2), Draws("b", np.arange(2000)).words(2)
    assert len(np.unique(np.concatenate([first, second, other]))) == 12_000


def test_the_numbers_stay_the_same() -> None:
    """In every version: a resumed run goes on with the same rows."""
    assert Draws("a", np.array([0, 10**12])).words(2).tolist() == [
        [13426076575278305879, 6436274739602871113],
        [9035800494918563448, 11677331053888694906],
    ]


@pytest.mark.parametrize("high", [2, 3, 1000])
def test_integers_are_uniform_and_independent(high: int) -> None:
    numbers = Draws("uniform", MANY).integers(high, 2)
    assert (numbers.min(), numbers.max()) == (0, high - 1)
    deviation = np.sqrt((high**2 - 1) / 12 / len(MANY))
    assert abs(numbers.mean(axis=0) - (high - 1) / 2).max() < 4 * deviation
    for one, other in ((numbers[:, 0], numbers[:, 1]), (numbers[:-1, 0], numbers[1:, 0])):  # in a row, between rows
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(len(MANY))


def test_distinct_numbers_come_in_every_order_equally_often() -> None:
    drawn = Counter(map(tuple, Draws("orders", MANY).distinct(4, 2).tolist()))
    assert set(drawn) == set(itertools.permutations(range(4), 2))
    expected = len(MANY) / 12
    assert max(abs(count - expected) for count in drawn.values()) < 4.5 * np.sqrt(expected)


def test_weighted_draws_go_by_the_weights_of_those_that_are_left() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    drawn = Counter(map(tuple, Draws("weights", MANY).distinct_weighted(weights, 2).tolist()))
    for first, second in itertools.permutations(range(3), 2):
        share = weights[first] / 8 * weights[second] / (8 - weights[first])
        expected = share * len(MANY)
        assert abs(drawn[first, second] - expected) < 4.5 * np.sqrt(expected)
