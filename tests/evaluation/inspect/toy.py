"""A tiny trained model that knows facts: a text names one of six things, and its last token asks if it is animate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel
from tests.golden import QUICK
from tests.models.parameters import abstract, in_dtype, random_params

CONFIG = ModelConfig(vocab_size=16, num_layers=2, width=16, head_dim=8, wkv_implementation="scan", dtype="float64")
THINGS, YES, NO, QUESTION, FILLERS = range(1, 7), 7, 8, 9, range(10, 16)
"""Of the things, the first three are animate."""
TIME, PLACE = 7, 2
"""Tokens of a text, and where the thing stands."""


def texts(rng: np.random.Generator, count: int) -> tuple[NDArray, NDArray]:
    """Token ids [B, T], and whether each text's thing is animate."""
    tokens = rng.choice(FILLERS, (count, TIME))
    things = rng.choice(THINGS, count)
    tokens[:, 0], tokens[:, PLACE], tokens[:, -1] = 0, things, QUESTION
    return tokens.astype(np.int32), things <= 3


@functools.cache
def trained_toy(steps: int = 60, batch: int = 32) -> LanguageModel:
    """A model that answers right."""
    rng = np.random.default_rng(0)
    drawn = [texts(rng, batch) for _ in range(steps)]
    tokens, animate = np.stack([t for t, _ in drawn]), np.stack([a for _, a in drawn])
    graphdef, optimizer = abstract(CONFIG)[0], optax.adam(2e-2)

    def loss(params: dict, tokens: jax.Array, answers: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens).logits[:, -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    def step(carry: tuple, texts: tuple) -> tuple:
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, *texts)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    @functools.partial(jax.jit, compiler_options=QUICK)
    def train(params: dict) -> tuple:
        answers = jnp.where(animate, YES, NO)
        return jax.lax.scan(step, (params, optimizer.init(params)), (jnp.asarray(tokens), answers))

    (params, _), losses = train(jax.tree.map(jnp.asarray, in_dtype(random_params(CONFIG), CONFIG)))
    assert losses[-1] < 0.05, losses
    return nnx.merge(graphdef, params)
