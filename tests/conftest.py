"""Fixtures for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import jax
import pytest


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives to the end, modules and tests: a tenth of all processor time."""
    gc.set_threshold(100_000, 50, 50)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Iterator[None]:
    """Drops what a module has compiled: each program takes memory maps, of which a process may have 65530 on Linux, and
    with tens of thousands of them everything becomes slow."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def float64() -> Iterator[None]:
    """Makes float64 JAX's default dtype for one test, and allows it at all."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Makes JAX refuse, for one test, to promote ranks (of all but scalars) and dtypes silently."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
