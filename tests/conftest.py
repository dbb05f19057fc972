"""Fixtures for every test."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.golden import QUICK_FLAGS

if importlib.util.find_spec("libtpu") is None:  # whose programs, in tests/devices, are compiled as users do
    # Compilers took half of all processor time. `AS_USERS` is for what is compiled as users do.
    os.environ["XLA_FLAGS"] = " ".join([*QUICK_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`: gives the files of tests/train, which share a run and its programs, to one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByRun(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/train" if file.startswith("tests/train/") else file

    return ByRun(config, log)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives to the end, modules and tests: a tenth of all processor time."""
    gc.set_threshold(100_000, 50, 50)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Iterator[None]:
    """Drops what was compiled once it takes many memory maps, of which a process may have 65530 on Linux: with tens of
    thousands of them everything becomes slow. Until then modules use each other's programs.

    Garbage goes with the module that made it: Orbax's of a damaged checkpoint warns, which only that module expects.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 6_000:
        jax.clear_caches()
    gc.collect()


TUNING = "RWKV_JAX_TUNING"
"""The variable that names the file of measurements."""
_numbers = itertools.count()


@pytest.fixture(autouse=True, scope="session")
def no_measurements_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets no fixture of a module read or write what the user has measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TUNING, str(tmp_path_factory.getbasetemp() / "tuning.json"))
        yield


@pytest.fixture(autouse=True)
def no_measurements(no_measurements_of_the_users: None) -> Iterator[None]:
    """Lets no test find what another one, or the user, has measured."""
    outside = os.environ[TUNING]
    os.environ[TUNING] = f"{outside}.{next(_numbers)}"
    yield
    os.environ[TUNING] = outside


@pytest.fixture(autouse=True, scope="session")
def no_states_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets no server of a test, in a process of its own or not, keep states where the user's keep them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "states"))
        yield


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
