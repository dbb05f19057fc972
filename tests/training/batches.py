"""Batches of random tokens."""

from __future__ import annotations

import numpy as np

from rwkv_jax.config import TrainConfig
from rwkv_jax.training.batch import Batch, make_batch


def one_batch(config: TrainConfig, seed: int = 0) -> Batch:
    """A batch of a run's shape, each row one text."""
    shape = (config.training.batch_size, config.training.sequence_length + 1)
    tokens = np.random.default_rng(seed).integers(1, config.model.vocab_size, shape)
    return make_batch(tokens.astype(np.int32), end_of_text=None)
