"""Accuracy counts what the model finds likeliest at scored positions, and a row is right if all of them are."""

from __future__ import annotations

import pytest

from tests.fake_devices import run_on_fake_devices
from tests.training.answers import CONFIG, answers_of


def check(found: dict[str, float], *, shards_of_time: int) -> None:
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-5)
    assert (found["right"], found["scored"]) == (9, 11)
    assert (found["whole"], found["rows"]) == (2 * shards_of_time, 3 * shards_of_time)


def test_answers_are_counted() -> None:
    check(answers_of(CONFIG), shards_of_time=1)


@pytest.mark.long
def test_answers_are_counted_on_a_mesh_that_splits_rows_time_and_vocabulary() -> None:
    check(run_on_fake_devices(8, "tests.training.answers"), shards_of_time=2)
