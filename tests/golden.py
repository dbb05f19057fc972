"""Reference numbers that other people's implementations gave, the measure of how far ours are, quick compilation.

Those of random weights lie in `tests/golden`, where README.md says how each was made: a missing one is a failure.
Trained models are other people's and lie in `shared/golden/tiny` beside the project's folder, or the tests skip.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.plan.devices import unoptimized_on_cpu

GOLDEN_DIR = Path(__file__).parent / "golden"
TINY_DIR = Path(__file__).parents[2] / "shared" / "golden" / "tiny"

QUICK = unoptimized_on_cpu()
"""Compiler options that take compilation to a fifth of its time: for tests of logic and for float64, where rounding by
what users run is not the question. The tests' process and those that it starts have them by `QUICK_FLAGS`."""
QUICK_FLAGS = [f"--{name}={value}".lower() for name, value in QUICK.items()]
"""The same as XLA_FLAGS."""
_OF_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_cpu_use_fusion_emitters": True,
}
AS_USERS = {name: _OF_USERS[name] for name in QUICK}
"""Compiler options that make what users run: where rounding in float32 is the question, or a program runs for long."""


@functools.cache
def _read(path: Path) -> dict[str, NDArray]:
    with np.load(path) as file:
        return dict(file)


def load_golden(name: str) -> dict[str, NDArray]:
    """The arrays of `tests/golden/NAME`, by key."""
    return _read(GOLDEN_DIR / name)


def tiny_model(name: str) -> Path:
    """The path of a trained model's file in `shared/golden/tiny`; skips the test where it is not at hand."""
    path = TINY_DIR / name
    if not path.is_file():
        pytest.skip(f"a trained model of other people's, not kept here: ../shared/golden/tiny/{name}")
    return path


def load_tiny(name: str) -> dict[str, NDArray]:
    """The arrays of a trained model's numbers, by key; skips as `tiny_model` does."""
    return _read(tiny_model(name))


def relative_error(x: ArrayLike, reference: ArrayLike) -> float:
    """|x - reference| / |reference| in the L2 norm, in float64; |x| where the reference is zero, infinite for NaN."""
    x, reference = (np.asarray(z).astype(np.float64) for z in (x, reference))
    assert x.shape == reference.shape
    error = float(np.linalg.norm(x - reference)) / (float(np.linalg.norm(reference)) or 1.0)
    return error if np.isfinite(error) else np.inf


def assert_close(values: Mapping[str, ArrayLike], reference: Mapping[str, ArrayLike], bound: float) -> None:
    """Fails, naming the arrays, where the relative error of any is above bound."""
    assert values.keys() == reference.keys()
    errors = {name: relative_error(values[name], reference[name]) for name in values}
    too_large = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bound}
    assert not too_large, f"relative errors above {bound:.0e}: {too_large}"
