"""The deliberate faults still fit the code, so that a change of a line is noticed before they are run by hand."""

from __future__ import annotations

import pytest

from tests.faults_in_code import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_line_of_a_fault_stands_once(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right) == 1
