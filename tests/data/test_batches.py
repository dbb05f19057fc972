"""Each epoch is a permutation, a batch depends on seed and step alone, evaluation predicts every token once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.batches import (
    batch_at,
    check_corpus_fits,
    evaluation_windows,
    indices_at,
    num_evaluation_batches,
    num_slots,
)

_TOKENS = np.arange(1003, dtype=np.uint16)
_SHAPE: dict[str, Any] = {"batch_size": 4, "sequence_length": 16}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_epoch_visits_every_slot_once(slots: int, seed: int, epoch: int) -> None:
    # One token a window and as many rows as windows, so that a step is an epoch.
    indices = indices_at(slots + 1, seed=seed, step=epoch, batch_size=slots, sequence_length=1)
    assert (indices.epochs == epoch).all()
    assert sorted(indices.slots.tolist()) == list(range(slots))


def test_an_epoch_predicts_no_token_twice() -> None:
    slots = num_slots(len(_TOKENS), 16)
    assert slots == 62
    predicted = np.concatenate(
        [batch_at(_TOKENS, seed=3, step=step, batch_size=2, sequence_length=16)[:, 1:].ravel() for step in range(31)]
    )
    assert len(predicted) == len(np.unique(predicted)) == slots * 16


def test_epochs_differ_in_order_and_in_offset() -> None:
    epochs = [indices_at(1003, seed=0, step=epoch, batch_size=62, sequence_length=16) for epoch in range(8)]
    assert len({tuple(epoch.slots) for epoch in epochs}) == 8
    assert len({int(epoch.starts[0] - epoch.slots[0] * 16) % 1003 for epoch in epochs}) > 3
    assert all((epoch.epochs == number).all() for number, epoch in enumerate(epochs))
    # A good permutation has neither long runs in order nor many places that stay.
    slots = np.concatenate([epoch.slots for epoch in epochs])
    assert np.mean(np.diff(slots) == 1) < 0.1
    assert np.mean(slots == np.tile(np.arange(62), 8)) < 0.1


def test_a_batch_may_straddle_two_epochs() -> None:
    indices = indices_at(1003, seed=0, step=15, **_SHAPE)
    assert indices.epochs.tolist() == [0, 0, 1, 1]


def test_windows_are_consecutive_tokens_of_a_ring() -> None:
    for step in range(40):
        batch = batch_at(_TOKENS, seed=1, step=step, **_SHAPE)
        assert batch.shape == (4, 17)
        assert batch.dtype == np.int32
        assert (np.diff(batch) % len(_TOKENS) == 1).all()
        assert (batch[:, 0] == indices_at(len(_TOKENS), seed=1, step=step, **_SHAPE).starts).all()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first = batch_at(_TOKENS, seed=7, step=5, **_SHAPE)
    batch_at(_TOKENS, seed=8, step=9, **_SHAPE)
    assert (batch_at(_TOKENS, seed=7, step=5, **_SHAPE) == first).all()
    assert (batch_at(_TOKENS, seed=7, step=6, **_SHAPE) != first).any()
    assert (batch_at(_TOKENS, seed=6, step=5, **_SHAPE) != first).any()


def test_the_order_never_changes() -> None:
    # A resumed run relies on this order: a change of these numbers breaks every run that is under way.
    assert indices_at(1003, seed=0, step=0, **_SHAPE).starts.tolist() == [237, 861, 365, 109]
    far = indices_at(10**9, seed=1, step=10**6, batch_size=2, sequence_length=512)
    assert far.starts.tolist() == [696885511, 102840583]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(0, 4), st.integers(0, 4))
def test_hosts_together_read_what_one_would(step: int, start: int, stop: int) -> None:
    whole = batch_at(_TOKENS, seed=2, step=step, **_SHAPE)
    part = batch_at(_TOKENS, seed=2, step=step, **_SHAPE, rows=slice(start, stop))
    assert part.tolist() == whole[start:stop].tolist()


def test_the_same_sequences_come_for_another_batch_size() -> None:
    small = [batch_at(_TOKENS, seed=2, step=step, batch_size=2, sequence_length=16) for step in range(6)]
    large = [batch_at(_TOKENS, seed=2, step=step, batch_size=6, sequence_length=16) for step in range(2)]
    assert np.concatenate(small).tolist() == np.concatenate(large).tolist()


def test_a_corpus_of_just_one_batch_will_do() -> None:
    check_corpus_fits(65, **_SHAPE)
    assert batch_at(np.arange(65, dtype=np.uint16), seed=0, step=3, **_SHAPE).shape == (4, 17)


@pytest.mark.parametrize(
    ("num_tokens", "remedy"),
    [
        (64, "set training.batch_size to at most 3, or set training.sequence_length to at most 15, or use more text"),
        (16, "; set training.sequence_length to at most 3, or use more text"),
        (4, "(one batch takes 65 tokens); use more text"),
        (0, "(one batch takes 65 tokens); use more text"),
    ],
)
def test_a_corpus_shorter_than_one_batch_is_refused(num_tokens: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(remedy)) as caught:
        check_corpus_fits(num_tokens, **_SHAPE)
    assert f"training.batch_size = 4: the corpus is shorter than one batch, its {num_tokens} training" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="shorter than one batch"):
        batch_at(np.zeros(num_tokens, np.uint16), seed=0, step=0, **_SHAPE)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(1, 5), st.integers(1, 20))
def test_evaluation_predicts_every_token_but_the_first_once(num_tokens: int, batch_size: int, length: int) -> None:
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint32)
    windows = list(evaluation_windows(tokens, batch_size=batch_size, sequence_length=length))
    assert len(windows) == num_evaluation_batches(num_tokens, batch_size=batch_size, sequence_length=length)
    predicted: list[int] = []
    for batch, mask in windows:
        assert batch.shape == (batch_size, length + 1)
        assert mask.shape == (batch_size, length)
        assert (batch.dtype, mask.dtype) == (np.int32, np.float32)
        counted = mask == 1
        assert ((batch[:, 1:] - batch[:, :-1])[counted] == 1).all()
        assert (batch[:, 1:][~counted] == 0).all()
        predicted += batch[:, 1:][counted].tolist()
    assert predicted == tokens[1:].tolist()


def test_a_few_evaluation_batches_are_spread_over_the_text() -> None:
    every = list(evaluation_windows(_TOKENS, **_SHAPE))
    some = list(evaluation_windows(_TOKENS, **_SHAPE, num_batches=4))
    assert len(every) == 16
    assert [batch[0, 0] for batch, _ in some] == [every[index][0][0, 0] for index in (0, 4, 8, 12)]
    assert len(list(evaluation_windows(_TOKENS, **_SHAPE, num_batches=99))) == 16
