"""Which documents are held out, and where a single one is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.split import Document, choose_held_out, split_document


def test_a_new_document_moves_no_other() -> None:
    names = [f"file_{i}.py" for i in range(500)]
    before = choose_held_out(names, 0.1)
    assert 25 <= len(before) <= 75
    after = choose_held_out([*names, *(f"new_{i}.py" for i in range(100))], 0.1)
    assert after & frozenset(names) == before
    assert choose_held_out(reversed(names), 0.1) == before


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(max_size=8), min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_neither_side_is_ever_empty(names: set[str], share: float) -> None:
    held_out = choose_held_out(names, share)
    assert held_out
    assert held_out < names


def test_copies_of_one_text_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match=re.escape("data.held_out = 0.1: the source has 1 distinct document(s)")):
        choose_held_out(["same", "same"], 0.1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_one_document_is_cut_at_a_line(lines: list[str], share: float) -> None:
    text = "first\n" + "\n".join(lines) + "\nlast"
    train, held_out = split_document(Document("x", text), share)
    assert train.text + held_out.text == text
    assert train.text.endswith("\n")
    assert held_out.text


def test_the_cut_is_near_the_share() -> None:
    train, held_out = split_document(Document("x", "123456789\n" * 1000), 0.05)
    assert (len(train.text), len(held_out.text)) == (9500, 500)


@pytest.mark.parametrize("text", ["a", "one line", "one line\n", "\n"])
def test_one_line_cannot_be_split(text: str) -> None:
    with pytest.raises(ConfigError, match="without a line break"):
        split_document(Document("x", text), 0.5)
