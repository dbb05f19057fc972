"""Evaluation predicts every held-out token but the first once, over windows of one shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.data.tokens.batches import evaluation_windows, num_evaluation_batches

_TOKENS = np.arange(1003, dtype=np.uint16)
_SHAPE: dict[str, Any] = {"batch_size": 4, "sequence_length": 16}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(1, 5), st.integers(1, 20))
def test_evaluation_predicts_every_token_but_the_first_once(num_tokens: int, batch_size: int, length: int) -> None:
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint32)
    windows = list(evaluation_windows(tokens, batch_size=batch_size, sequence_length=length))
    assert len(windows) == num_evaluation_batches(num_tokens, batch_size=batch_size, sequence_length=length)
    predicted: list[int] = []
    for batch, mask, _ in windows:
        assert mask is not None
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
    assert [batch.tokens[0, 0] for batch in some] == [every[index][0][0, 0] for index in (0, 4, 8, 12)]
    assert len(list(evaluation_windows(_TOKENS, **_SHAPE, num_batches=99))) == 16


def test_masked_tokens_do_not_count() -> None:
    counts = _TOKENS % 5 == 0
    counted = [
        token
        for batch, mask, _ in evaluation_windows(_TOKENS, **_SHAPE, mask=counts)
        for token in batch[:, 1:][mask == 1].tolist()
    ]
    assert counted == _TOKENS[1:][counts[1:]].tolist()
