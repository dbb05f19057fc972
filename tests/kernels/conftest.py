"""Fixtures for the tests of operators."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from tests.kernels.operators import Way


@pytest.fixture
def arithmetic(way: Way) -> Iterator[None]:
    """Allows float64 for a test of an implementation that has it."""
    with jax.enable_x64(way.dtype is np.float64):
        yield
