"""Values that cannot work are refused by field, value and remedy."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from rwkv_jax.checks import (
    ConfigError,
    checker,
    is_number,
    is_whole,
    require,
    require_counts,
    require_positive,
    require_whole,
)


def test_a_condition_that_does_not_hold() -> None:
    require(True, "x", 3, "must be less")
    with pytest.raises(ConfigError, match=r"^x = 'a': must be less$"):
        require(False, "x", "a", "must be less")


def test_fields_of_a_config() -> None:
    section = types.SimpleNamespace(x=3)
    checker(section)(True, "x", "must be less")
    with pytest.raises(ConfigError, match=r"^section\.x = 3: must be less$"):
        checker(section, "section")(False, "x", "must be less")
    with pytest.raises(ConfigError, match=r"^section\.x = 3: must be less$"):
        checker(types.SimpleNamespace(section=section))(False, "section.x", "must be less")


@pytest.mark.parametrize("value", [0, 11, True, 2.0, "3", None, float("nan"), [4]])
def test_whole_numbers_within_bounds(value: Any) -> None:
    require_whole("x", np.int8(1), 1, 10)
    require_whole("x", 10, 1, 10)
    with pytest.raises(ConfigError, match=r"^x = .*: must be a whole number, from 1 to 10$"):
        require_whole("x", value, 1, 10)


def test_whole_numbers_without_an_upper_bound() -> None:
    require_whole("x", 10**30, 1)
    with pytest.raises(ConfigError, match=r"^x = 0: must be a whole number, not less than 1$"):
        require_whole("x", 0, 1)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_positive_fields(value: float) -> None:
    section = types.SimpleNamespace(good=1, bad=value)
    require_positive(section, "section", "good")
    with pytest.raises(ConfigError, match=r"^section\.bad = .*: must be greater than zero$"):
        require_positive(section, "section", "good", "bad")


@pytest.mark.parametrize(("counts", "shown"), [((), ""), ((3, 0), "3 0"), ((-1,), "-1")])
def test_counts(counts: tuple[int, ...], shown: str) -> None:
    require_counts(sizes=(1, 2))
    with pytest.raises(ConfigError, match=rf"^sizes = {shown}: must be at least 1 each, and one at least$"):
        require_counts(sizes=counts)


def test_true_and_false_are_no_numbers() -> None:
    assert is_number(1.5)
    assert is_number(np.float32(1))
    assert is_whole(np.int64(1))
    assert not is_whole(1.0)
    assert not is_number(True)
    assert not is_whole(True)
    assert not is_number("1")
