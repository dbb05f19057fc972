"""Splits over devices: what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rwkv_jax.config import ConfigError, ParallelConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tensor": 0}, "parallel.tensor = 0: must be a whole number from 1"),
    ({"tensor": "auto"}, "parallel.tensor = 'auto': must be a whole number from 1"),
    ({"data": "4"}, "parallel.data = '4': must be a whole number from 1, or auto"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ParallelConfig(**values)
