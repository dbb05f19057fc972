"""Programs of float64, compiled quickly."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.programs import compiled_quickly


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    """Allows float64, and saves time in compilation."""
    with jax.enable_x64(True), compiled_quickly():
        yield
