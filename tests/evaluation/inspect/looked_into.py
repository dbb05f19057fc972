"""Small random models in float64 to look into, and a text for them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.models import LanguageModel
from tests.models.parameters import SMALL, in_dtype, merge, named_config, random_params
from tests.models.small_transformers import LLAMA

TOKENS = np.random.default_rng(0).integers(0, 41, (2, 6)).astype(np.int32)


@functools.cache
def small_model(name: str, dtype: str = "float64") -> LanguageModel:
    """A generation's, or another architecture's, with random parameters."""
    own = {**SMALL, "llama": LLAMA}
    config = own[name] if name in own else named_config(name, vocab_size=41, width=32, head_dim=8, ffn_width=48)
    config = dataclasses.replace(config, num_layers=2, dtype=dtype)
    return merge(config, jax.tree.map(jnp.asarray, in_dtype(random_params(config), config)))
