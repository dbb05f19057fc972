"""Draws the README's picture, the time of a token by the tokens before it, from the table of docs/benchmarks.md.

python benchmarks/draw_context.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
TABLE = DOCS / "benchmarks.md"
PICTURE = DOCS / "latency_by_context.svg"
HEADER = "| time of a token behind so many others |"


def read_table(text: str) -> tuple[list[int], dict[str, list[float]]]:
    """The numbers of tokens before, and the milliseconds of a token for each model.

    Raises:
      ValueError: the text has no such table.
    """
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith(HEADER)), None)
    if start is None:
        raise ValueError(f"docs/benchmarks.md: no table begins with {HEADER!r}")
    contexts = [int(cell) for cell in _cells(lines[start])[1:] if cell.isdigit()]
    times = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = _cells(line)
        times[name.removesuffix(", ms")] = [float(re.sub(r"[*,]", "", cell)) for cell in cells[: len(contexts)]]
    return contexts, times


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def draw(contexts: list[int], times: dict[str, list[float]], path: Path) -> None:
    """Writes the picture; the same numbers give the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "rwkv-jax"
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, milliseconds), color in zip(times.items(), ("#1f6f5c", "#b0453a"), strict=True):
        axes.plot(contexts, milliseconds, "o-", color=color)
        axes.annotate(
            name, (contexts[-1], milliseconds[-1]), (0, 7), textcoords="offset points", ha="right", color=color
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="ms a token", ylim=(10, 4000))
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    draw(*read_table(TABLE.read_text()), PICTURE)


if __name__ == "__main__":
    main()
