"""Loss by position: does a model use what lies far behind, and does it hold beyond the length it was trained at?

The state is carried over the whole text, so there are no windows, and memory does not grow with the length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.statistics import standard_error
from rwkv_jax.inference.engine.engine import Engine


class PositionLoss(NamedTuple):
    """Mean loss of the tokens between two positions of their texts."""

    begin: int
    """First position; 0 is the token that follows the start of the text."""
    end: int
    """Position after the last."""
    loss: float
    """Mean -log p(token), nats."""
    stderr: float | None
    """Standard error over texts; None of a single one."""
    count: int
    """Tokens."""


class PositionLosses(NamedTuple):
    """Losses by position, and what carries the text."""

    losses: tuple[PositionLoss, ...]
    state_bytes: int
    """Of one text's state, at any position."""


def position_edges(length: int, first: int = 64) -> tuple[int, ...]:
    """0, 64, 128, 256, ... up to a length, which is the last."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(first, 2 * edges[-1])))
    return tuple(edges)


def loss_by_position(engine: Engine, texts: Sequence[Sequence[int]], edges: Sequence[int] = ()) -> PositionLosses:
    """Mean losses between positions of texts, each scored whole behind the end-of-text token.

    Args:
      texts: token ids; those that are too short for a pair of edges do not count there.
      edges: ascending positions; none are doublings up to the longest text.

    Raises:
      ConfigError: no text, or positions that no text reaches.
    """
    if not texts or not all(map(len, texts)):
        raise ConfigError("texts: each must have a token at least, and there must be one")
    edges = tuple(edges) or position_edges(max(map(len, texts)))
    if list(edges) != sorted(set(edges)) or not 0 <= edges[0] < edges[-1] <= max(map(len, texts)):
        raise ConfigError(
            f"edges = {edges}: must ascend from 0 or more to at most {max(map(len, texts))}, the longest text's tokens"
        )
    logprobs = [np.array(score.token_logprobs) for score in engine.score([tuple(text) for text in texts])]
    losses = []
    for begin, end in itertools.pairwise(edges):
        parts = [-own[begin:end] for own in logprobs if len(own) > begin]
        count = sum(map(len, parts))
        mean = math.fsum(float(part.sum()) for part in parts) / count
        losses.append(PositionLoss(begin, end, mean, standard_error([float(part.mean()) for part in parts]), count))
    return PositionLosses(tuple(losses), engine.state_bytes)
