"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def float64() -> Iterator[None]:
    """Makes float64 JAX's default dtype for one test, and allows it at all."""
    with jax.enable_x64(True):
        yield
