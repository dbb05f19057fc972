"""Tables of plain text, for reports and errors. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], align: str, indent: str = "  ") -> str:
    """Rows of cells as lines whose columns are two spaces apart.

    Args:
      rows: as many cells each as `align` has characters.
      align: "<" or ">" for each column: cells are moved to the left or to the right.
      indent: stands before each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(align, widths, strict=True))
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)) for row in rows
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)
