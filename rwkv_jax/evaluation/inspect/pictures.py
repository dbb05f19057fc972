"""Pictures of what is inside a model, by Matplotlib: PNG, SVG or PDF, by the file's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.atomic import replace_file
from rwkv_jax.checks import require
from rwkv_jax.evaluation.inspect.decays import HalfLives
from rwkv_jax.evaluation.inspect.states import StateHistory
from rwkv_jax.evaluation.inspect.tracing import CausalTrace
from rwkv_jax.figures import encoded, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = "viridis"
_GRID = "#d9d9d9"
_MOST_PANELS = 12
_MOST_LABELS = 40


def _write(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    kinds = (".png", ".svg", ".pdf")
    require(path.suffix.lower() in kinds, "path", str(path), f"must end with {', '.join(kinds)}")
    replace_file(path, encoded(figure, path.suffix[1:].lower()))
    return path


def _layer_colors(figure: Figure, axes: Any, layers: int) -> NDArray:
    """A color for each layer, [L, 4], with their scale beside the axes."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(Normalize(0, max(layers - 1, 1)), _COLORS)
    bar = figure.colorbar(scale, ax=axes, label="layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return np.asarray(colormaps[_COLORS](np.linspace(0, 1, layers)))


def _label_tokens(axis: Any, pieces: Sequence[str] | None, count: int) -> None:
    """The tokens' texts along an axis, if there are not too many."""
    if pieces is None or count > _MOST_LABELS:
        return
    # A dollar sign would begin a formula; most fonts have no glyphs for all writing systems.
    shown = [ascii(piece)[1:-1].replace("$", r"\$") for piece in pieces]
    axis.set_ticks(range(count), shown, rotation=90 if axis.axis_name == "x" else 0, fontsize=7)


def draw_half_lives(found: HalfLives, path: Path | str) -> Path:
    """Each layer's channels from the most forgetful on; of decays that depend on the text, the middle quantile.

    Channels that never forget have no point.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    middle = found.tokens[len(found.shares) // 2]
    colors = _layer_colors(figure, axes, len(middle))
    for lives, color in zip(middle, colors, strict=True):
        lives = np.sort(lives)
        axes.plot(np.linspace(0, 100, len(lives)), np.where(np.isfinite(lives), lives, np.nan), color=color)
    axes.set_yscale("log")
    axes.set(xlabel="channels, % from the most forgetful", ylabel="half-life, tokens")
    axes.grid(color=_GRID)
    return _write(figure, path)


def draw_states(history: StateHistory, path: Path | str) -> Path:
    """Norm and effective rank along the text: a line a layer, the mean over its heads and all texts."""
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2)
    colors = _layer_colors(figure, panels, history.norm.shape[1])
    shown = ((history.norm, "norm of a head's state"), (history.effective_rank, "effective rank of a head's state"))
    for axes, (values, label) in zip(panels, shown, strict=True):
        for layer, color in enumerate(colors):
            axes.plot(history.positions, values[:, layer].mean(axis=(1, 2)), color=color)
        axes.set(xlabel="tokens read", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(color=_GRID)
    return _write(figure, path)


def draw_attention(
    shares: Sequence[NDArray],
    path: Path | str,
    *,
    titles: Sequence[str] | None = None,
    pieces: Sequence[str] | None = None,
) -> Path:
    """Heat maps of `attention_share`, [T, T] each: row t reads column i; of many, twelve evenly spaced ones.

    Args:
      shares: of some layers or heads.
      titles: of the panels; None numbers them as layers.
      pieces: the tokens' texts, which label the axes of up to 40 tokens.
    """
    titles = [f"layer {index}" for index in range(len(shares))] if titles is None else titles
    chosen = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), _MOST_PANELS)).round().astype(int))
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.2 * columns + 0.8, 3.4 * rows + 0.3)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    image = None
    for axes, index in zip(panels, chosen, strict=False):
        # Square roots, so that weak reading from far away is seen beside the token's own share.
        image = axes.imshow(np.sqrt(shares[index]), cmap=_COLORS, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(titles[index], fontsize=9)
        _label_tokens(axes.xaxis, pieces, shares[index].shape[1])
        _label_tokens(axes.yaxis, pieces, shares[index].shape[0])
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    panels[0].set(xlabel="token that is read", ylabel="token that reads")
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), label="share of what is read")
        bar.set_ticks(np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]).tolist(), labels=["0", "1%", "10%", "25%", "50%", "100%"])
    return _write(figure, path)


def draw_trace(trace: CausalTrace, path: Path | str, *, pieces: Sequence[str] | None = None) -> Path:
    """Heat map of the answer's probability with one block's output at one token put back."""
    from matplotlib.ticker import MaxNLocator

    layers, time = trace.restored.shape
    figure = new_figure(max(5, 0.3 * time + 2.5), max(3, 0.2 * layers + 2.2))
    axes = figure.subplots()
    low, high = sorted((trace.corrupted, trace.clean))
    image = axes.imshow(trace.restored, cmap=_COLORS, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label_tokens(axes.xaxis, pieces, time)
    axes.set(xlabel="token put back", ylabel="layer put back")
    axes.set_title(f"clean {trace.clean:.3g}, corrupted {trace.corrupted:.3g}", fontsize=9)
    figure.colorbar(image, ax=axes, label="probability of the answer")
    return _write(figure, path)
