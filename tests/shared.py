"""Real data that lies in `shared/data` beside the project's folder, where README.md says what each file is."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA_DIR = Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The path of `shared/data/NAME`; skips the test where that file is not at hand."""
    path = DATA_DIR / name
    if not path.is_file():
        pytest.skip(f"no real data: {name} is not in ../shared/data")
    return path
