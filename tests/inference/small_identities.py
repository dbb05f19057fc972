"""Small models of every generation in float32, and the identities that the files of their states have."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.state.state_file import Identity, model_identity
from rwkv_jax.models import LanguageModel
from tests.models.parameters import SMALL, in_dtype, merge, random_params

SINGLE = {generation: dataclasses.replace(config, dtype="float32") for generation, config in SMALL.items()}
"""By generation."""
SEVEN = SINGLE["7"]


def params_of(config: ModelConfig) -> Any:
    return in_dtype(random_params(config), config)


@functools.cache
def model_of(config: ModelConfig) -> LanguageModel:
    return merge(config, jax.tree.map(jnp.asarray, params_of(config)))


@functools.cache
def identity_of(config: ModelConfig) -> Identity:
    return model_identity(model_of(config), ByteTokenizer())
