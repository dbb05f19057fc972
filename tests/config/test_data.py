"""Data: what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rwkv_jax.config import ConfigError, DataConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"source": ""}, "data.source = '': "),
    ({"held_out": -0.1}, "data.held_out = -0.1: must lie in "),
    ({"held_out": 1.0}, "data.held_out = 1.0: must lie in "),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_wrong_values_are_refused_by_name_with_a_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        DataConfig(**values)
