"""Figures by Matplotlib, without pyplot, which keeps global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, *, dpi: int = 120) -> Figure:
    """An empty figure on white; sizes in inches."""
    # Imported here since most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def encoded(figure: Figure, kind: str = "png") -> bytes:
    """A figure's file: png, svg or pdf."""
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()
