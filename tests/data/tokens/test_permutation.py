"""Permutations are bijections at any size, and the words behind them depend on their name alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.data.tokens.permutation import ROUNDS, permute, random_words, shuffle_epochs


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_every_place_is_sent_to_another(size: int, seed: int) -> None:
    sent = permute(np.arange(size), size, random_words(str(seed), ROUNDS))
    assert sorted(sent.tolist()) == list(range(size))


def test_each_place_is_sent_alone() -> None:
    keys = random_words("x", ROUNDS)
    whole = permute(np.arange(1000), 1000, keys)
    assert [int(permute(np.array([place]), 1000, keys)[0]) for place in range(50)] == whole[:50].tolist()


def test_large_sizes_need_no_memory() -> None:
    size = 3 * 10**12
    sent = permute(np.array([0, 1, size - 1]), size, random_words("x", ROUNDS))
    assert len(set(sent.tolist())) == 3
    assert sent.max() < size


def test_each_epoch_has_every_item_once_in_another_order() -> None:
    items = shuffle_epochs(np.arange(36), 12, "x")
    epochs = items.reshape(3, 12)
    for number, epoch in enumerate(epochs):
        np.testing.assert_array_equal(epoch, permute(np.arange(12), 12, random_words(f"x {number}", ROUNDS)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert shuffle_epochs(np.array([30, 3]), 12, "x").tolist() == items[[30, 3]].tolist()


def test_words_never_change() -> None:
    assert random_words("0 0", 2).tolist() == [11684132067157788011, 1774097906621196774]
    assert random_words("0 0", 3)[:2].tolist() == random_words("0 0", 2).tolist()
    assert random_words("0 1", 1)[0] != random_words("0 0", 1)[0]
