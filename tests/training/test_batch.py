"""Batches from rows of tokens: where documents begin, which rows go on, and who reads what."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

from rwkv_jax.config import StepConfig
from rwkv_jax.data.tokens.rows import Rows
from rwkv_jax.training.batch import Batch, batch_loader, dropout_keys, make_batch

ROWS = np.array([[5, 6, 0, 7, 8], [0, 1, 2, 0, 3], [1, 2, 3, 4, 0]], np.int32)


def test_tokens_are_read_and_the_next_ones_predicted() -> None:
    batch = make_batch(ROWS, end_of_text=None)
    assert batch.tokens.tolist() == ROWS[:, :-1].tolist()
    assert batch.targets.tolist() == ROWS[:, 1:].tolist()
    assert batch.segment_ids is batch.continues_previous is batch.mask is None


def test_a_document_begins_at_its_end_of_text_token() -> None:
    assert make_batch(ROWS, end_of_text=0).segment_ids.tolist() == [[0, 0, 1, 1], [1, 1, 1, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize(("end_of_text", "continues"), [(0, [True, False, True]), (None, [True, True, True])])
def test_a_row_goes_on_unless_a_document_begins_there(end_of_text: int | None, continues: list[bool]) -> None:
    assert make_batch(ROWS, end_of_text=end_of_text, carries_state=True).continues_previous.tolist() == continues


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("resets", [True, False])
def test_a_loaded_batch_is_the_made_one_and_its_rows_are_read_once(carries: bool, resets: bool) -> None:
    training = StepConfig(batch_size=3, sequence_length=4, carry_state=carries, reset_at_documents=resets)
    read: list[slice] = []

    mask = np.tri(3, 4, dtype=np.float32)

    def reader(rows: Rows) -> Callable[[slice], Rows]:
        def select(which: slice) -> Rows:
            read.append(which)
            return rows.select(which)

        return select

    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load = batch_loader(on_one_device, on_one_device, training, 0)
    end_of_text = 0 if resets else None
    for rows, trains, expected in (
        (Rows(ROWS), True, make_batch(ROWS, end_of_text=end_of_text, carries_state=carries)),
        (Rows(ROWS, mask), False, make_batch(ROWS, end_of_text=end_of_text, mask=mask)),
    ):
        read.clear()
        batch: Batch = load(reader(rows), trains=trains)
        assert read == [slice(0, 3)]
        assert jax.tree.structure(batch) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_dropouts_numbers_are_functions_of_seed_step_and_row() -> None:
    whole = dropout_keys(3, 7, slice(0, 4), 8)
    assert whole.dtype == np.uint32
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(dropout_keys(3, 7, slice(2, 4), 8), whole[2:])
    assert not (dropout_keys(3, 8, slice(0, 4), 8) == whole).any()
    assert not (dropout_keys(4, 7, slice(0, 4), 8) == whole).any()
