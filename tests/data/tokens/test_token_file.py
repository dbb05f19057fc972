"""What is a token of a vocabulary, in any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rwkv_jax.data.tokens.token_file import first_wrong_token


@pytest.mark.parametrize(
    ("values", "dtype", "position"),
    [
        ([0, 9], np.uint8, None),
        ([0, 9], np.float64, None),
        ([0, 10, 11], np.uint16, 1),
        ([-1, 9], np.int8, 0),
        ([9, 2**32 + 1], np.int64, 1),
        ([1.0, 2.5], np.float64, 1),
        ([1.0, float("nan")], np.float64, 1),
        ([1.0, float("inf")], np.float64, 1),
        ([1.0, -1.0], np.float64, 1),
    ],
)
def test_the_first_wrong_token(values: list[float], dtype: Any, position: int | None) -> None:
    assert first_wrong_token(np.array(values, dtype), 10) == position
