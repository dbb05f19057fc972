"""What a probe has found, for JSON, Markdown and a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_jax.evaluation.statistics import Estimate
from rwkv_jax.figures import encoded, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f5fa8", "#d1495b", "#5b7f3a", "#7a5195", "#c07c00")
GRID = "#d9d9d9"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A probe's numbers, and how to show them."""

    probe: str
    title: str
    caveat: str
    """What the numbers do not say."""
    numbers: Any
    """NamedTuples and lists of plain values."""
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    draw: Callable[[Axes], None] | None = None
    """Draws into axes of its own; None where a table is enough."""

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are text, which JSON lacks."""
        return {"probe": self.probe, "title": self.title, "caveat": self.caveat, "numbers": plain(self.numbers)}

    def markdown(self) -> str:
        """Title, table and caveat."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{table}\n\n{self.caveat}\n"

    def picture(self) -> bytes | None:
        """A PNG; None if there is none to draw."""
        if self.draw is None:
            return None
        figure = new_figure(7, 4)
        axes = figure.subplots()
        self.draw(axes)
        axes.set_title(self.title)
        return encoded(figure)


def plain(value: Any) -> Any:
    """Lists, dicts and numbers of NamedTuples and sequences."""
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def with_interval(found: Estimate, digits: int = 3) -> str:
    """0.531 (0.410 to 0.640)."""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def error_bars(found: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to the ends of their intervals, as matplotlib's `errorbar` takes them."""
    low = [each.value - (each.value if each.low is None else each.low) for each in found]
    high = [(each.value if each.high is None else each.high) - each.value for each in found]
    return [[max(0.0, x) for x in side] for side in (low, high)]
