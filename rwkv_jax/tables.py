"""Plain-text tables for reports and errors. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], align: str, indent: str = "  ") -> str:
    """Formats rows of cells as lines, with columns two spaces apart.

    Args:
      rows: each with as many cells as `align` has characters.
      align: "<" or ">" per column, for left or right alignment.
      indent: prefix of each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(align, widths, strict=True))
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)) for row in rows
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)
