"""Rows depend on seed, step and row alone, are consecutive tokens, and are refused where a corpus cannot give them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.corpus import mix
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.data.tokens.order import RowOrder
from rwkv_jax.data.tokens.rows import TrainingRows, training_rows
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile

_SHAPE: dict[str, Any] = {"batch_size": 4, "sequence_length": 16}
_ORDERS: list[RowOrder] = ["windows", "official", "streams"]


def _corpus(tokens: np.ndarray, name: str = "x.bin") -> Corpus:
    file = TokenFile(Path(name), tokens, 2 * len(tokens), 1)
    return Corpus((file,), (1,), None, bytes, WorldTokenizer(), name)


def _rows(num_tokens: int = 1003, order: RowOrder = "windows", **fields: Any) -> TrainingRows:
    corpus = _corpus(np.arange(num_tokens, dtype=np.uint16))
    return training_rows(corpus, **({"order": order, "seed": 1} | _SHAPE | fields))


@pytest.fixture
def mixed() -> Corpus:
    """Three quarters of the rows from tokens below 1000, a quarter from those of 10000 and more."""
    parts = [_corpus(np.arange(1000, dtype=np.uint16), "a"), _corpus(np.arange(10000, 10100, dtype=np.int64), "b")]
    return mix(parts, (3072, 1024))


@pytest.mark.parametrize("order", _ORDERS)
def test_rows_are_consecutive_tokens_from_where_they_begin(order: RowOrder) -> None:
    rows = _rows(order=order)
    assert rows.num_tokens == 1003
    for step in range(80):
        batch = rows.read(step).tokens
        assert (batch.shape, batch.dtype) == ((4, 17), np.int32)
        assert (np.diff(batch) % 1003 == 1).all()
        assert rows.row_locations(step) == [f"x.bin, token {token}" for token in batch[:, 0]]
    whole = np.stack([rows.read(step).tokens for step in range(80)])
    # The tokens are a ring, but for the official order.
    assert bool((np.diff(whole) < 0).any()) == (order != "official")


@pytest.mark.parametrize("order", _ORDERS)
@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 10**9), start=st.integers(0, 4), stop=st.integers(0, 4))
def test_hosts_together_read_what_one_would(order: RowOrder, step: int, start: int, stop: int) -> None:
    rows = _rows(order=order)
    assert rows.read(step, slice(start, stop)).tokens.tolist() == rows.read(step).tokens[start:stop].tolist()
    assert rows.row_locations(step, slice(start, stop)) == rows.row_locations(step)[start:stop]


def test_the_seed_is_that_of_windows_and_streams() -> None:
    for order in _ORDERS:
        same = _rows(order=order).read(3).tokens.tolist() == _rows(order=order, seed=2).read(3).tokens.tolist()
        assert same == (order == "official")


def test_an_epoch_of_windows_predicts_no_token_twice() -> None:
    rows = _rows(batch_size=2)
    predicted = np.concatenate([rows.read(step).tokens[:, 1:].ravel() for step in range(31)])
    assert len(predicted) == len(np.unique(predicted)) == 62 * 16


def test_the_same_windows_come_for_another_batch_size() -> None:
    small, large = _rows(batch_size=2), _rows(batch_size=6)
    assert [row for step in range(6) for row in small.read(step).tokens.tolist()] == [
        row for step in range(2) for row in large.read(step).tokens.tolist()
    ]


def test_streams_go_on_where_they_stopped() -> None:
    rows = _rows(order="streams")
    for step in range(100):
        assert (rows.read(step).tokens[:, -1] == rows.read(step + 1).tokens[:, 0]).all()


def test_the_official_order_never_reads_past_the_end() -> None:
    rows = _rows(101 * 16 + 1, "official", magic_prime=101)
    starts = np.concatenate([rows.locate(step).starts for step in range(101)])
    assert starts.max() == 100 * 16
    assert _rows(101 * 16 + 16 + 3, "official").magic_prime == 101
    assert rows.read(0).tokens[0, 0] == 62 * 16  # f = int(101 * 0.618) = 62, sample 1


def test_a_mixture_reads_each_source_in_its_share(mixed: Corpus) -> None:
    rows = training_rows(mixed, order="windows", seed=0, batch_size=64, sequence_length=9)
    assert rows.num_tokens == 1100
    firsts = np.concatenate([rows.read(step).tokens[:, 0] for step in range(64)])
    assert (firsts >= 10000).sum() == 1024
    for step in range(3):
        batch = rows.read(step).tokens
        names = [place.split(",")[0] for place in rows.row_locations(step)]
        assert names == ["b" if first >= 10000 else "a" for first in batch[:, 0]]
        assert (np.diff(batch)[batch[:, :-1] < 999] == 1).all()
    # Each source is read like a corpus of its own, by epochs of its own.
    for source, chosen, count in [(0, firsts < 10000, 3072), (1, firsts >= 10000, 1024)]:
        corpus = _corpus(mixed.sources[source].tokens)
        alone = training_rows(corpus, order="windows", seed=0, batch_size=1, sequence_length=9)
        assert firsts[chosen].tolist() == [int(alone.read(step).tokens[0, 0]) for step in range(count)]


@pytest.mark.parametrize(
    ("tokens", "wrong"),
    [
        (np.array([5, 65536, 7, 8, 9], np.int32), "token 1 is 65536"),
        (np.array([5, 6, -1, 8, 9], np.int16), "token 2 is -1"),
        (np.array([5, 6, 7, 2**32 + 8, 9], np.int64), f"token 3 is {2**32 + 8}"),
        (np.array([5, 6, 7, 8, 9.5]), "token 4 is 9.5"),
        (np.array([np.nan, 6, 7, 8, 9]), "token 0 is nan"),
    ],
)
def test_what_is_no_token_is_named_when_it_is_read(tokens: np.ndarray, wrong: str) -> None:
    rows = training_rows(_corpus(tokens), order="windows", seed=0, batch_size=1, sequence_length=4)
    with pytest.raises(ConfigError, match=re.escape(f"x.bin: {wrong}, and the vocabulary has 65536; the file is")):
        rows.read(0)


def test_whole_numbers_of_any_type_are_tokens() -> None:
    for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float64):
        rows = training_rows(
            _corpus(np.arange(100).astype(dtype)), order="streams", seed=0, batch_size=2, sequence_length=8
        )
        assert (np.diff(rows.read(0).tokens) % 100 == 1).all()


@pytest.mark.parametrize("order", _ORDERS)
def test_masks_are_read_with_the_tokens_they_are_of(order: RowOrder) -> None:
    tokens = np.arange(1003, dtype=np.uint16)
    corpus = _corpus(tokens)
    masked = dataclasses.replace(corpus.train, mask=tokens % 3 == 0)
    rows = training_rows(dataclasses.replace(corpus, sources=(masked,)), **{"order": order, "seed": 1} | _SHAPE)
    for step in range(80):  # around the ring, too
        found, mask, _ = rows.read(step)
        assert mask is not None
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, found[:, 1:] % 3 == 0)
    assert _rows(order=order).read(0).mask is None


def test_in_a_mixture_all_of_a_source_without_a_mask_counts(mixed: Corpus) -> None:
    masked = dataclasses.replace(mixed.sources[1], mask=np.zeros(100, bool))
    corpus = dataclasses.replace(mixed, sources=(mixed.sources[0], masked))
    rows = training_rows(corpus, order="windows", seed=0, batch_size=64, sequence_length=9)
    found, mask, _ = rows.read(0)
    assert mask is not None
    assert mask.tolist() == [[float(row[0] < 10000)] * 9 for row in found]
    assert 0 < mask.mean() < 1


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x.bin: mask of shape \(4,\) for tokens of shape \(5,\)"):
        TokenFile(Path("x.bin"), np.arange(5), 5, 1, mask=np.ones(4, bool))


def test_masks_of_held_out_tokens_are_joined() -> None:
    parts = [
        dataclasses.replace(_corpus(np.arange(9)), held_out=TokenFile(Path("h"), np.arange(5), 5, 1, mask=mask))
        for mask in (np.arange(5) > 2, None)
    ]
    held_out, without = (mix(chosen, (1, 1)).held_out for chosen in (parts, parts[1:] * 2))
    assert held_out is not None
    assert held_out.mask is not None
    assert held_out.mask.tolist() == [True, False, False, True, True, True, True, True, True]
    assert without is not None
    assert without.mask is None


@pytest.mark.parametrize("order", _ORDERS)
def test_a_corpus_of_just_one_batch_will_do(order: RowOrder) -> None:
    assert _rows(12 * 16 + 1, order, batch_size=12).read(3).tokens.shape == (12, 17)


@pytest.mark.parametrize("order", _ORDERS)
@pytest.mark.parametrize(
    ("num_tokens", "remedy"),
    [
        (64, "set training.batch_size to at most 3, or set training.sequence_length to at most 15, or use more text"),
        (16, "; set training.sequence_length to at most 3, or use more text"),
        (4, "(one batch takes 65 tokens); use more text"),
        (0, "(one batch takes 65 tokens); use more text"),
    ],
)
def test_a_corpus_shorter_than_one_batch_is_refused(order: RowOrder, num_tokens: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(remedy)) as caught:
        _rows(num_tokens, order)
    begin = f"training.batch_size = 4: the corpus is shorter than one batch, its {num_tokens} training tokens"
    assert str(caught.value).startswith(begin)


def test_a_magic_prime_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.magic_prime = 41: leaves out more than a tenth of the 62"):
        _rows(order="official", magic_prime=41)


def test_a_corpus_whose_magic_prime_leaves_out_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.order = 'official': 160 tokens .* leave out more than a tenth of 10"):
        _rows(160, "official")


@pytest.mark.parametrize(("order", "remedy"), [("official", "set data.order to"), ("streams", "switch training.carry")])
def test_a_mixture_has_one_order(mixed: Corpus, order: RowOrder, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.mixture: there is no {order} order of several sources.*{remedy}"):
        training_rows(mixed, order=order, seed=0, **_SHAPE)


def test_a_source_shorter_than_a_row_is_named(mixed: Corpus) -> None:
    training_rows(mixed, order="windows", seed=0, batch_size=200, sequence_length=99)
    with pytest.raises(ConfigError, match=r"data.mixture: b has 100 training tokens, less than one sequence of"):
        training_rows(mixed, order="windows", seed=0, batch_size=1, sequence_length=100)


def test_rows_of_a_corpus_say_what_they_are(mixed: Corpus) -> None:
    assert mixed.bytes_per_token == pytest.approx(0.75 * 2000 / 999 + 0.25 * 200 / 99)
    assert dataclasses.replace(mixed, sources=mixed.sources[:1], shares=(1,)).train is mixed.sources[0]
    with pytest.raises(ValueError, match="too many values"):
        _ = mixed.train
