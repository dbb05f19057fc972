"""Files with seeded faults are read as before, or refused by name: nothing else is raised, and little goes unseen."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.files import KINDS, Outcome, outcomes


def _check(kind: str, found: list[Outcome]) -> None:
    assert [outcome for outcome in found if outcome.result == "traceback"] == []
    if KINDS[kind].has_digest:
        assert [outcome for outcome in found if outcome.result == "silent"] == []
    assert Counter(outcome.result for outcome in found)["named"] >= len(found) // 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_faults(kind: str) -> None:
    _check(kind, list(outcomes(kind, 12, seed=0)))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_faults(kind: str) -> None:
    _check(kind, list(outcomes(kind, 200, seed=1)))
