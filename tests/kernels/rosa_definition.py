"""What ROSA looks up, as its definition says it, and what a flipped bit changes, by looking up again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Symbols = Sequence[int]


def definition(q: Symbols, k: Symbols, v: Symbols, window: int | None = None) -> tuple[list[int], list[int]]:
    """Answers, or -1, and lengths of matches: the longest suffix of q, where it ended last among the keys before.

    Args:
      window: keys that a token looks back on.
    """
    answers, lengths = [-1] * len(q), [0] * len(q)
    for now in range(len(q)):
        for end in range(now - 1, -1 if window is None else max(now - window, 0) - 1, -1):
            length = 0
            while length <= end and q[now - length] == k[end - length]:
                length += 1
            if length > lengths[now]:
                answers[now], lengths[now] = v[end + 1], length
    return answers, lengths


def of_rows(
    q: NDArray, k: NDArray, v: NDArray, window: int | None = None, segment_ids: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    """The definition of each text of [B, G, T]."""
    answers, lengths = np.full(q.shape, -1), np.zeros(q.shape, int)
    for row in range(q.shape[0]):
        ids = np.zeros(q.shape[2], int) if segment_ids is None else segment_ids[row]
        bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), q.shape[2]]
        for begin, end in itertools.pairwise(bounds):
            for group in range(q.shape[1]):
                own = (row, group, slice(begin, end))
                answers[own], lengths[own] = definition(q[own].tolist(), k[own].tolist(), v[own].tolist(), window)
    return answers, lengths


def phi(scores: Any, answers: NDArray, lengths: NDArray) -> NDArray:
    """What the answers of each token score, [T]."""
    bits = np.asarray(scores.one).shape[3]
    is_one = (answers[..., None] >> np.arange(bits)) & 1 == 1
    per_bit = np.where(lengths[..., None] > 0, np.where(is_one, scores.one, scores.zero), scores.none)
    return np.sum(per_bit, axis=(0, 1, 3))


def flips(arrays: dict[str, NDArray], scores: Any, first: int = 0, **options: Any) -> dict[str, NDArray]:
    """phi with one bit flipped, less phi, for the tokens of q, k and v from `first` on: [B, G, T, bits] each.

    With a window, of a key what it changes while it is in the window.
    """
    bits = np.asarray(scores.one).shape[3]

    def of(arrays: dict[str, NDArray]) -> NDArray:
        answers, lengths = of_rows(arrays["q"], arrays["k"], arrays["v"], **options)
        return phi(scores, answers[:, :, first:], lengths[:, :, first:])

    whole, found = of(arrays), {}
    for name, symbols in arrays.items():
        found[name] = np.zeros((*symbols.shape, bits))
        for place in np.ndindex(*symbols.shape, bits):
            flipped = symbols.copy()
            flipped[place[:3]] ^= 1 << place[3]
            last = place[2] + options["window"] if name == "k" and "window" in options else symbols.shape[2]
            found[name][place] = np.sum((of(arrays | {name: flipped}) - whole)[: max(last + 1 - first, 0)])
    return {name: x[:, :, first:] for name, x in found.items()}
