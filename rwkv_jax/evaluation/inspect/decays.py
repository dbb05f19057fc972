"""How long channels remember: half-lives of the decays, by layer and channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.inspect.layers import Recording


class HalfLives(NamedTuple):
    """Tokens after which a channel of the state has decayed to a half, ln(1/2) / ln(w).

    In RWKV-7 this is the decay alone: the delta rule also removes what it replaces, so that content is lost sooner.
    """

    shares: NDArray
    """[Q]: shares of a text's tokens, such as 0.1, 0.5 and 0.9."""
    tokens: NDArray
    """[Q, L, C]: quantiles over a text's tokens of the half-life that each gives; infinite where nothing decays. Equal
    for all Q where decays are parameters (RWKV-4, 5). Channels are those of the heads in order, c = h N + n."""
    depends_on_text: bool
    """Whether decays depend on the text, as from RWKV-6 on."""


def half_lives(recordings: Sequence[Recording], shares: Sequence[float] = (0.1, 0.5, 0.9)) -> HalfLives:
    """Half-lives of every layer's channels.

    Args:
      recordings: of `record`, all layers.
      shares: quantiles over the tokens of all texts.

    Raises:
      ConfigError: a Transformer, in which nothing decays, or shares outside 0 to 1.
    """
    if any("log_w" not in recording.inputs for recording in recordings):
        raise ConfigError(f"model: has no decays (its operator is {recordings[0].operator}); take an RWKV")
    if not len(shares) or not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"shares = {shares}: must lie from 0 to 1")
    over_time = recordings[0].inputs["log_w"].ndim == recordings[0].output.ndim
    layers = []
    for recording in recordings:
        log_w = recording.inputs["log_w"].astype(np.float64)
        log_w = log_w.reshape(log_w.shape[0] * log_w.shape[1] if over_time else 1, -1)  # [tokens, C]
        lives = np.divide(-math.log(2), log_w, out=np.full_like(log_w, math.inf), where=log_w < 0)
        # (Neighbors, not means of them, of which one may be infinite.)
        layers.append(np.quantile(lives, np.asarray(shares), axis=0, method="nearest"))
    return HalfLives(np.asarray(shares), np.stack(layers, axis=1), over_time)
