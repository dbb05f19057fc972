"""Columns of plain text are aligned."""

from __future__ import annotations

from rwkv_jax.tables import format_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("", "bytes", "note"), ("parameters", "7", ""), ("x", "12345", "all of them")]
    assert format_table(rows, "<><") == (
        "              bytes  note\n  parameters      7\n  x           12345  all of them"
    )


def test_without_an_indent() -> None:
    assert format_table([("a", "bc"), ("def", "g")], ">>", indent="") == "  a  bc\ndef   g"
