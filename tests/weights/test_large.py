"""Loading a file of the 1.5B model's shape: how much memory it takes, and that it takes no longer than reading it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from load_weights import peak_memory, times, write_model

pytestmark = pytest.mark.long


def test_memory_stays_below_the_file_and_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "1.5B.pth"
    size = write_model(path, layers=24, width=2048)
    assert size > 3e9
    memory = peak_memory(path)
    assert size < memory["peak"] < size + 2e9


def test_loading_takes_no_longer_than_two_plain_reads(tmp_path: Path) -> None:
    path = tmp_path / "0.1B.pth"
    write_model(path, layers=12, width=768)
    found = times(path, 9)
    # The first load of a process traces the model, too.
    assert statistics.median(load / read for read, load in list(zip(found["read"], found["load"], strict=True))[1:]) < 2
