"""Engines for tests of how texts share slots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rwkv_jax.inference.engine.engine import Engine
from tests.inference.models import CONFIGS, quick_engine, random_model
from tests.programs import compilations


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[str]]:
    """Names of the programs that have been compiled since the module began."""
    with compilations() as names:
        yield names


@pytest.fixture(scope="module")
def engine(compiled: list[str]) -> Engine:
    return quick_engine(random_model(CONFIGS["7"]), fresh=True, max_queue=60)


@pytest.fixture(scope="module")
def narrow() -> Engine:
    """With one slot."""
    return quick_engine(random_model(CONFIGS["7"]), num_slots=1, max_queue=4)
