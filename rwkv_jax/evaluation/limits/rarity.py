"""Rare knowledge: loss and accuracy of tokens by how often the training text had them.

A model learns the head of a distribution before its tail (Head-to-Tail, Sun et al. 2023, arXiv:2308.10168, asks it of
facts). Tokens stand in for facts here, since their frequencies are known of any text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.engine.engine import Engine

EDGES = (0, 1, 10, 100, 1000, 10_000)
"""Frequencies that begin a bucket: never seen, 1 to 9 times, 10 to 99 times ..."""


class RarityBucket(NamedTuple):
    """Tokens of some frequency in the training text."""

    begin: int
    """Least frequency."""
    end: int | None
    """Least frequency of the next bucket; None: no limit."""
    loss: float | None
    """Mean -log p(token), nats; None if the text has no such token."""
    accuracy: float | None
    """Share that was the most likely token."""
    count: int
    """Such tokens in the text that was scored."""


def by_rarity(
    engine: Engine, texts: Sequence[Sequence[int]], training: np.ndarray, edges: Sequence[int] = EDGES
) -> list[RarityBucket]:
    """Scores texts, whose tokens are counted by their frequency in the training text.

    Args:
      texts: token ids of text that was not trained on.
      training: token ids [n] of the training text, or of a part of it.

    Raises:
      ConfigError: no text.
    """
    if not texts or not all(map(len, texts)):
        raise ConfigError("texts: each must have a token at least, and there must be one")
    counts = np.bincount(np.asarray(training), minlength=engine.config.vocab_size)
    scores = engine.score([tuple(text) for text in texts])
    frequency = np.concatenate([counts[np.asarray(text)] for text in texts])
    losses = np.concatenate([-np.array(score.token_logprobs) for score in scores])
    is_argmax = np.concatenate([np.array(score.is_argmax) for score in scores])
    found = []
    for begin, end in zip(edges, [*edges[1:], None], strict=True):
        own = (frequency >= begin) & (True if end is None else frequency < end)
        count = int(own.sum())
        values = (float(losses[own].mean()), float(is_argmax[own].mean())) if count else (None, None)
        found.append(RarityBucket(begin, end, *values, count))
    return found
