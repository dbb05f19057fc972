"""Compilers for devices that are not there."""

from __future__ import annotations

import pytest

import deviceless


@pytest.fixture(autouse=True, scope="session")
def compilers() -> None:
    """Asking for these tests where the compilers are not installed is a mistake, and no reason to skip them."""
    assert deviceless.is_available(), "these tests need the packages of constraints/devices-3.11.txt: make test-devices"
    deviceless.prepare()
