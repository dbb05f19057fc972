"""Many tokens drawn at once, and how often each is to be drawn by the definition of the settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.inference.sampling.choose import choose, no_occurrences, stack_settings
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.golden import AS_USERS

DRAWS = 4000
LOGITS = np.random.default_rng(0).normal(0, 2, 12)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits[np.isfinite(logits)].max())
    return weights / weights.sum()


def smallest_set(badness: np.ndarray, probabilities: np.ndarray, mass: float) -> np.ndarray:
    """Whether a token is kept: the least bad ones until their probabilities reach the mass, and what ties with them."""
    if mass >= 1:
        return np.ones(len(badness), bool)
    total = 0.0
    for token in np.argsort(badness, kind="stable"):
        total += probabilities[token]
        if total >= mass:
            return badness <= badness[token]
    raise AssertionError(f"all tokens together have {total} < {mass}")


def renormalized(probabilities: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


def expected(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Probability of each token, by the numbered steps of the module's docstring that follow the penalties."""
    in_top_k = np.ones(len(logits), bool)
    if sampling.top_k:
        in_top_k = logits >= np.sort(logits)[-min(sampling.top_k, len(logits))]
    if sampling.order == "openai":
        probabilities = renormalized(softmax(logits / sampling.temperature), in_top_k)
        kept = in_top_k & smallest_set(-probabilities, probabilities, sampling.top_p)
    else:
        probabilities = softmax(logits)
        kept = in_top_k & smallest_set(-probabilities, probabilities, sampling.top_p)
    kept &= probabilities >= sampling.min_p * probabilities.max()
    probabilities = renormalized(probabilities, kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(probabilities)
        distance = np.abs(surprise - np.nansum(probabilities * surprise))
    probabilities = renormalized(probabilities, kept & smallest_set(distance, probabilities, sampling.typical_p))
    if sampling.order == "rwkv":
        probabilities = probabilities ** (1 / sampling.temperature)
    return probabilities / probabilities.sum()


@functools.cache
def compiled() -> Any:
    return jax.jit(choose, compiler_options=AS_USERS)


def draw(
    logits: np.ndarray,
    rows: Sequence[SamplingParams],
    seed: int = 0,
    occurrences: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """One token for each row, of logits [V]; rows and tokens are filled up, so that few programs serve all tests."""
    num_rows, size = DRAWS * -(-len(rows) // DRAWS), len(logits)
    width = size if size in (1, 12) else 12 if size < 12 else 1000

    def filled(values: np.ndarray, rest: float) -> np.ndarray:
        wide = np.concatenate([values, np.full(width - size, rest)]).astype(np.float32)
        return np.broadcast_to(wide, (DRAWS, width))

    arguments = (
        filled(logits, -np.inf),
        filled(no_occurrences(size) if occurrences is None else occurrences, -1),
        filled(np.zeros(size) if bias is None else bias, 0),
    )
    settings = stack_settings([*rows, *[SamplingParams.greedy()] * (num_rows - len(rows))])
    keys = jax.random.split(jax.random.key(seed), num_rows)
    tokens = []
    for start in range(0, num_rows, DRAWS):
        own = slice(start, start + DRAWS)
        drawn = compiled()(*arguments, jax.tree.map(lambda x: x[own], settings), keys[own])  # noqa: B023  used at once
        assert drawn.dtype == jnp.int32
        tokens.append(drawn)
    return np.concatenate(tokens)[: len(rows)]


def agrees(tokens: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether no token without probability was drawn, and the others as often as chance allows."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return False
    likely = probabilities * len(tokens) > 8
    terms = (counts[likely] - probabilities[likely] * len(tokens)) ** 2 / (probabilities[likely] * len(tokens))
    # Chi-square: its mean is the number of terms and its variance twice that; six deviations away is no chance.
    return bool(terms.sum() < len(terms) + 6 * math.sqrt(2 * len(terms)))
