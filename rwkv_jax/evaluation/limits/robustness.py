"""Floods: does the state stay finite, whatever is read, and does the model still predict text afterwards?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.checks import require_whole
from rwkv_jax.inference.engine.engine import Engine


class Flood(NamedTuple):
    """What reading a flood of tokens did."""

    name: str
    num_tokens: int
    largest: tuple[float, ...]
    """Largest absolute number in the state after each eighth of the tokens."""
    is_finite: bool
    """Whether the state and the logits were finite after each of them."""


def floods(vocab_size: int, end_of_text: int, num_tokens: int, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Token ids [num_tokens] that no text has."""
    generator = np.random.default_rng(seed)
    one, other = generator.choice(vocab_size, 2, replace=False)
    return {
        "random tokens": generator.integers(vocab_size, size=num_tokens),
        "one token, repeated": np.full(num_tokens, one),
        "two tokens in turn": np.resize([one, other], num_tokens),
        "every token in order": np.arange(num_tokens) % vocab_size,
        "only ends of text": np.full(num_tokens, end_of_text),
    }


def read_floods(engine: Engine, num_tokens: int = 100_000, seed: int = 0) -> list[Flood]:
    """Reads each flood from an empty state. Raises ConfigError for tokens that 8 pieces cannot share."""
    require_whole("num_tokens", num_tokens, 8)
    found = []
    given = floods(engine.config.vocab_size, engine.tokenizer.end_of_text, num_tokens, seed)
    for name, ids in given.items():
        snapshot, largest, is_finite = None, [], True
        for piece in np.array_split(ids, 8):
            snapshot = engine.prefill(snapshot, piece.tolist())
            arrays = [x for x in jax.tree.leaves(snapshot.state) if jnp.issubdtype(x.dtype, jnp.floating)]
            largest.append(max(float(jnp.max(jnp.abs(x))) for x in arrays))
            is_finite &= all(bool(jnp.isfinite(x).all()) for x in (*arrays, snapshot.logits))
        found.append(Flood(name, num_tokens, tuple(largest), is_finite))
    return found
