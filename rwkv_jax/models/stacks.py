"""How a model's layers are held: layer 0 by itself, and every run of equal layers after it as one stack.

A model whose layers 1 to L - 1 are alike has them under `blocks`, with a leading axis L - 1. In a hybrid, whose layers
have mixers of several kinds, layers A to B of one kind are under `blocks_A_B`. Names say which layers they hold, so
that whoever walks through a nested dict of parameters needs no config.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

FIRST = "first_block"
"""Layer 0, whose arrays have no leading axis."""

_STACK = "blocks"


class LayerRun(NamedTuple):
    """Successive layers of one kind."""

    name: str
    """Of the part that holds them: `first_block`, `blocks` or `blocks_A_B`."""
    layers: range
    kind: str
    """As in `GenerationSpec.layer_kinds`."""
    index: int
    """Number of earlier layers of this kind: where the run begins in the kind's state."""


def layer_runs(kinds: Sequence[str]) -> tuple[LayerRun, ...]:
    """The runs of a model's layers, in order.

    Args:
      kinds: of each layer.
    """
    bounds = [0, 1, *(layer for layer in range(2, len(kinds)) if kinds[layer] != kinds[layer - 1]), len(kinds)]
    runs: list[LayerRun] = []
    for begin, end in itertools.pairwise(bounds):
        is_all = (begin, end) == (1, len(kinds))
        name = FIRST if begin == 0 else _STACK if is_all else f"{_STACK}_{begin}_{end - 1}"
        runs.append(LayerRun(name, range(begin, end), kinds[begin], list(kinds[:begin]).count(kinds[begin])))
    return tuple(runs)


def is_stack(part: str) -> bool:
    """Whether a part of a model is stacked layers, whose arrays have a leading axis."""
    return part.partition("_")[0] == _STACK


def is_layers(part: str) -> bool:
    """Whether a part of a model is a layer or stacked layers."""
    return part == FIRST or is_stack(part)


def has_layer_axis(path: Sequence[str]) -> bool:
    """Whether the parameter at a path has a leading axis of layers: is of a stack, also of a model within a model."""
    return any(map(is_stack, path))


def stacked_layers(part: str, num_layers: int) -> range:
    """The layers that a stack holds.

    Args:
      num_layers: L, which `blocks` does not say.
    """
    if part == _STACK:
        return range(1, num_layers)
    _, first, last = part.split("_")
    return range(int(first), int(last) + 1)
