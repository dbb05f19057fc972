"""All measures of one text in one model: numbers for JSON, pictures, and lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.evaluation.inspect.attention import attention_map, attention_share, mean_distance
from rwkv_jax.evaluation.inspect.decays import HalfLives, half_lives
from rwkv_jax.evaluation.inspect.layers import SOFTMAX, beginning, record
from rwkv_jax.evaluation.inspect.pictures import draw_attention, draw_half_lives, draw_states
from rwkv_jax.evaluation.inspect.states import StateHistory, state_history
from rwkv_jax.models import LanguageModel
from rwkv_jax.tables import format_table

_POINTS = 32
"""Positions of a text at which states are measured, about."""


class Inspection(NamedTuple):
    """What one text shows of a model."""

    tokens: NDArray
    """int [T], the text."""
    half_lives: HalfLives | None
    """None if a layer has attention."""
    states: StateHistory | None
    """None if a layer has attention."""
    shares: NDArray
    """[L, M, M]: `attention_share` of the first M tokens, mean over the heads (RWKV-4: over the channels)."""
    mean_distance: NDArray
    """[L, H] of those M tokens, in tokens; of RWKV-4 [L, C]."""


def inspect_text(model: LanguageModel, tokens: Sequence[int], map_tokens: int = 48) -> Inspection:
    """Measures one text.

    Args:
      tokens: [T].
      map_tokens: M, tokens of the attention maps at most, which take H M^2 numbers a layer.

    Raises:
      ConfigError: as `record`.
    """
    ids = np.asarray(tokens)
    recordings = record(model, ids)
    is_recurrent = all(recording.operator != SOFTMAX for recording in recordings)
    lives = half_lives(recordings) if is_recurrent else None
    states = state_history(model, ids, max(1, math.ceil(len(ids) / _POINTS))) if is_recurrent else None
    shares, distances = [], []
    for recording in recordings:
        share = attention_share(attention_map(beginning(recording, map_tokens))[0])
        shares.append(share.mean(axis=0))
        distances.append(mean_distance(share))
    return Inspection(ids, lives, states, np.stack(shares), np.stack(distances))


def as_json(value: Any) -> Any:
    """NamedTuples, arrays and numbers as what JSON has: six digits, null for what is not finite."""
    if (fields := getattr(value, "_asdict", None)) is not None:
        return as_json(fields())
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def draw(inspection: Inspection, folder: Path, pieces: Sequence[str]) -> None:
    """Writes half_lives.png, states.png and attention.png.

    Args:
      pieces: the text of each token.
    """
    if inspection.half_lives is not None:
        draw_half_lives(inspection.half_lives, folder / "half_lives.png")
    if inspection.states is not None:
        draw_states(inspection.states, folder / "states.png")
    size = inspection.shares.shape[1]
    draw_attention(list(inspection.shares), folder / "attention.png", pieces=pieces[:size])


def as_table(inspection: Inspection) -> str:
    """A line a layer."""
    heading = ["layer"]
    columns: list[list[str]] = [[str(layer) for layer in range(len(inspection.shares))]]
    if inspection.half_lives is not None:
        middle = inspection.half_lives.tokens[len(inspection.half_lives.shares) // 2]
        heading += ["half-life 10%", "50%", "90% of channels"]
        columns += [
            [f"{life:.3g}" for life in np.quantile(middle, share, axis=1, method="nearest")]
            for share in (0.1, 0.5, 0.9)
        ]
    if inspection.states is not None:
        heading += ["state norm", "effective rank", "stable rank"]
        ends = (inspection.states.norm, inspection.states.effective_rank, inspection.states.stable_rank)
        columns += [[f"{number:.3g}" for number in values[-1].mean(axis=(1, 2))] for values in ends]
    heading.append("reads back")
    columns.append([f"{number:.3g}" for number in inspection.mean_distance.mean(axis=1)])
    rows = [heading, *map(list, zip(*columns, strict=True))]
    return format_table(rows, ">" * len(heading), indent="")
