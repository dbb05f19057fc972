"""Reference numbers that other people's implementations gave, the measure of how far ours are, quick compilation.

The numbers lie in `shared/golden` beside the project's folder, where README.md says how each was made. Where they are
absent the tests that need them are skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

GOLDEN_DIR = Path(__file__).parents[2] / "shared" / "golden"

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiler options that take compilation to a third of its time: for tests of logic and for float64, where rounding by
what users run is not the question. Tests in float32 compile as users do."""


@functools.cache
def _read(path: Path) -> dict[str, NDArray]:
    with np.load(path) as file:
        return dict(file)


def load_golden(name: str) -> dict[str, NDArray]:
    """The arrays of `shared/golden/NAME`, by key; skips the test where that file is not at hand."""
    path = GOLDEN_DIR / name
    if not path.is_file():
        pytest.skip(f"no reference numbers: {name} is not in ../shared/golden")
    return _read(path)


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
