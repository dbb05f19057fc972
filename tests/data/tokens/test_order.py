"""Each order reads what it promises, and the official one reads what the official trainer reads."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokens.order import (
    check_magic_prime,
    find_magic_prime,
    magic_primes,
    num_windows,
    official_starts,
    shuffled_windows,
    stream_starts,
)

_MINIPILE = 1498226207
_PILE = 332115325534


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_epoch_visits_every_window_once(num_sequences: int, seed: int, epoch: int) -> None:
    row_index = epoch * num_sequences + np.arange(num_sequences)
    found = shuffled_windows(row_index, num_tokens=num_sequences + 1, seed=seed, sequence_length=1)
    assert (found.epoch == epoch).all()
    assert sorted(found.window.tolist()) == list(range(num_sequences))


def test_epochs_differ_in_order_and_in_offset() -> None:
    epochs = [
        shuffled_windows(epoch * 62 + np.arange(62), num_tokens=1003, seed=0, sequence_length=16) for epoch in range(8)
    ]
    assert len({tuple(epoch.window) for epoch in epochs}) == 8
    assert len({int(epoch.start[0] - epoch.window[0] * 16) % 1003 for epoch in epochs}) > 3
    # A good permutation has neither long runs in order nor many places that stay.
    window = np.concatenate([epoch.window for epoch in epochs])
    assert np.mean(np.diff(window) == 1) < 0.1
    assert np.mean(window == np.tile(np.arange(62), 8)) < 0.1


def test_rows_of_one_step_may_be_of_two_epochs() -> None:
    found = shuffled_windows(np.arange(60, 64), num_tokens=1003, seed=0, sequence_length=16)
    assert found.epoch.tolist() == [0, 0, 1, 1]
    alone = [
        shuffled_windows(np.array([row]), num_tokens=1003, seed=0, sequence_length=16).start for row in range(60, 64)
    ]
    assert found.start.tolist() == np.concatenate(alone).tolist()


def test_the_order_of_windows_never_changes() -> None:
    # A resumed run relies on this order: a change of these numbers breaks every run that is under way.
    near = shuffled_windows(np.arange(4), num_tokens=1003, seed=0, sequence_length=16)
    assert near.start.tolist() == [237, 861, 365, 109]
    far = shuffled_windows(2 * 10**6 + np.arange(2), num_tokens=10**9, seed=1, sequence_length=512)
    assert far.start.tolist() == [696885511, 102840583]


def test_no_offset_of_an_epoch_runs_further_than_the_ring() -> None:
    assert num_windows(33, 16) == 2
    assert num_windows(32, 16) == 1
    assert num_windows(0, 16) == 0


# The official order


@pytest.mark.parametrize(
    ("num_tokens", "sequence_length", "prime"),
    [
        (_MINIPILE, 512, 2926181),
        (_MINIPILE, 1024, 1463027),
        (_MINIPILE, 2048, 731531),
        (_MINIPILE, 4096, 365759),
        (_PILE, 1024, 324331313),
        (_PILE, 2048, 162165671),
        (_PILE, 4096, 81082817),
        (_PILE, 8192, 40541399),
    ],
)
def test_magic_primes_are_the_published_ones(num_tokens: int, sequence_length: int, prime: int) -> None:
    assert find_magic_prime(num_tokens, sequence_length) == prime
    check_magic_prime(prime, num_tokens, sequence_length)


def test_magic_primes_of_short_corpora() -> None:
    assert [find_magic_prime(num_sequences * 10 + 9, 10) for num_sequences in (12, 18, 98, 228)] == [11, 17, 89, 227]
    assert magic_primes(18 * 1024, (512, 1024, 1536, 2048, 9216)) == {1024: 17, 1536: 11}
    assert magic_primes(2, (1,)) == {}


@pytest.mark.parametrize(
    ("num_tokens", "reason"),
    [
        (29, "fewer than three"),
        (30, "2 would leave out more than a tenth of 3"),
        (1000, "89 would leave out more than a tenth of 100"),
    ],
)
def test_too_few_sequences_for_a_magic_prime_are_refused(num_tokens: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.order = 'official': {num_tokens} .*= 10 .*\({reason}\); use more"):
        find_magic_prime(num_tokens, 10)


def test_the_prime_that_is_found_would_be_taken_if_it_were_given() -> None:
    refused = []
    for num_sequences in range(2, 2000):
        try:
            prime = find_magic_prime(num_sequences * 10 + 9, 10)
        except ConfigError:
            refused.append(num_sequences)
        else:
            check_magic_prime(prime, num_sequences * 10 + 9, 10)
    assert refused[-1] == 227


def test_the_first_rows_of_minipile_are_the_verified_ones() -> None:
    starts = official_starts(np.arange(3), magic_prime=2926181, sequence_length=512)
    assert starts.tolist() == [925941248, 1414711296, 1029138944]
    # By hand: sample 2 is f 2^3 mod p of f = 1808479.
    assert 1808479 * 8 % 2926181 * 512 == 1414711296


def test_the_official_samples_of_two_mini_epochs_and_processes() -> None:
    """Sample numbers as the official trainer counts them: 1 + epoch 40320 + idx world_size + rank."""
    prime, world_size, batch = 2926181, 4, 8  # 8 rows a step, of which each of 4 processes reads 2
    for epoch, idx in [(0, 0), (0, 6), (0, 10078), (1, 0), (1, 2)]:
        step = (epoch * 40320 + idx * world_size) // batch
        rows = official_starts(step * batch + np.arange(batch), magic_prime=prime, sequence_length=512)
        expected = set()
        for rank in range(world_size):
            for offset in range(batch // world_size):
                sample = 1 + epoch * 40320 + (idx + offset) * world_size + rank
                expected.add((1808479 * sample**3) % prime * 512)
        assert set(rows.tolist()) == expected


@pytest.mark.parametrize("prime", [2, 5, 11, 17, 101, 1013])
@pytest.mark.parametrize("first", [0, 7])
def test_the_official_order_is_a_bijection(prime: int, first: int) -> None:
    starts = official_starts(first + np.arange(prime), magic_prime=prime, sequence_length=3)
    assert sorted(starts.tolist()) == [3 * slot for slot in range(prime)]


def test_numbers_beyond_64_bits_are_exact() -> None:
    far = 10**9
    (start,) = official_starts(np.array([far]), magic_prime=324331313, sequence_length=1024).tolist()
    factor = int(324331313 * ((5**0.5 - 1) / 2))
    assert start == factor * pow(far + 1, 3, 324331313) % 324331313 * 1024


@pytest.mark.parametrize(
    ("prime", "message"),
    [
        (0, "data.magic_prime = 0: is no prime"),
        (-5, "data.magic_prime = -5: is no prime"),
        (95, "data.magic_prime = 95: is no prime"),
        (97, "data.magic_prime = 97: leaves 1 when divided by 3"),
        (101, "data.magic_prime = 101: is more than the 99 sequences that there are"),
        (83, "data.magic_prime = 83: leaves out more than a tenth of the 99 sequences that there are"),
    ],
)
def test_a_prime_that_does_not_fit_is_refused(prime: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_magic_prime(prime, 999, 10)
    assert "(in 999 training tokens at training.sequence_length = 10); leave it out" in str(caught.value)


def test_the_last_window_needs_one_token_more() -> None:
    check_magic_prime(89, 891, 10)
    with pytest.raises(ConfigError, match="is more than the 88 sequences"):
        check_magic_prime(89, 890, 10)


# Streams

_STREAMS: dict[str, Any] = {"num_tokens": 1003, "seed": 5, "batch_size": 4, "sequence_length": 16}


def test_each_stream_goes_on_where_it_stopped() -> None:
    starts = stream_starts(np.arange(4 * 200), **_STREAMS).reshape(200, 4)
    assert ((starts[1:] - starts[:-1]) % 1003 == 16).all()
    assert ((starts[:, 1:] - starts[:, :-1]) % 1003 == 250).all()
    assert starts.min() >= 0
    assert starts.max() < 1003


def test_the_offset_of_the_streams_depends_on_the_seed() -> None:
    offsets = {int(stream_starts(np.arange(1), **(_STREAMS | {"seed": seed}))[0]) for seed in range(10)}
    assert len(offsets) > 5


def test_the_order_of_streams_never_changes() -> None:
    assert stream_starts(np.array([0, 5, 4 * 10**6]), **_STREAMS).tolist() == [450, 716, 594]
