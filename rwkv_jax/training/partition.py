"""Partition of parameters into trained and frozen ones, as two disjoint nested dicts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rwkv_jax.config import ModelConfig, TuningConfig
from rwkv_jax.models.tuned import is_trained, merge_nested


def train_all(path: tuple[str, ...]) -> bool:
    """The partition in which nothing is frozen."""
    return True


def tuned_partition(tuning: TuningConfig, model: ModelConfig) -> Callable[[tuple[str, ...]], bool]:
    """The partition of a run: what its tuning trains, or everything."""
    return functools.partial(is_trained, tuning, model) if tuning.is_partial else train_all


def split_params(
    params: Any, is_trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> tuple[Any, Any]:
    """Splits a nested dict by parameters into trained and frozen ones.

    Args:
      is_trained: a `step.Partition`; a stack of layers is one path, under its name (models/stacks.py).
      path: of `params` within the whole dict.
    """
    trained, frozen = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            for side, part in zip((trained, frozen), split_params(value, is_trained, (*path, name)), strict=True):
                if part:
                    side[name] = part
        else:
            (trained if is_trained((*path, name)) else frozen)[name] = value
    return trained, frozen


def merge_params(trained: Any, frozen: Any) -> Any:
    """Merges two nested dicts from `split_params`."""
    return merge_nested(frozen, trained)
