"""Exponential moving averages of weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def averaged(averages: Any, params: Any, step: Array, decay: float) -> Any:
    """The averages after a step: d old + (1 - d) parameters, with d = min(decay, (1 + s) / (10 + s)).

    The smaller share in the first steps lets the averages forget where the run began, as in TensorFlow's
    ExponentialMovingAverage(num_updates=).

    Args:
      averages, params: nested dicts of the same arrays.
      step: s, the steps that the run has taken before this one.
    """
    begins = (1 + jnp.asarray(step, float)) / (10 + jnp.asarray(step, float))
    share = 1 - jnp.minimum(decay, begins)
    return jax.tree.map(lambda old, new: old + share.astype(old.dtype) * (new - old), averages, params)
