"""Learning rates by patterns of official names, and what a factor of zero freezes.

Layers 1 to L - 1 of a parameter are one array. If a pattern names some of them, the array has a factor for each; if all
of them have the factor zero it is frozen like any other parameter, without gradient and optimizer state.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.checks import require, require_known
from rwkv_jax.models.stacks import has_layer_axis, is_layers
from rwkv_jax.models.tuned import ADAPTER_PARTS
from rwkv_jax.weights.official import official_names

Rates = Sequence[tuple[str, float]]
"""Patterns and factors, `OptimizerConfig.rates`."""

_TUNED = ("adapter", "initial_state")
"""Parameters that a tuning run adds, under the names of what they change."""


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of the shell names a parameter: all of its name, or what follows "blocks.N.".

    A last ".weight" may be left out: att.key names att.key.weight, and the parts of an adapter of it.
    """
    return any(fnmatch.fnmatchcase(each, pattern) for each in _forms(name))


def _forms(name: str) -> Iterator[str]:
    _, is_layer, of_layer = f".{name}".partition(".blocks.")
    within = of_layer.split(".", 1)[1] if is_layer else name
    for each in dict.fromkeys((name, within)):
        yield each
        matrix, _, last = each.rpartition(".")
        if last in ADAPTER_PARTS:
            yield f"{matrix}.weight"
        if last in ("weight", *ADAPTER_PARTS):
            yield matrix


def rate_factors(params: Any, rates: Rates) -> Any:
    """A nested dict like the parameters: the factor of each, or float64 [layers, 1, ...] where its layers differ.

    The last pattern that matches a name counts; without one the factor is 1.

    Args:
      params: nested dict of arrays or shapes; those of stacks have a leading axis of layers.
    """

    def of(path: tuple[Any, ...], parameter: Any) -> float | NDArray[np.float64]:
        found = [
            next((factor for pattern, factor in reversed(rates) if matches(name, pattern)), 1.0)
            for name in _names(path, parameter)
        ]
        if len(set(found)) == 1:
            return float(found[0])
        return np.array(found).reshape(-1, *(1,) * (parameter.ndim - 1))

    return jax.tree.map_with_path(of, params)


def _names(path: tuple[Any, ...], parameter: Any) -> list[str]:
    """The official names of a parameter: one, or of a stack one for each of its layers."""
    keys = _keys(path)
    within = next((place for place, key in enumerate(keys) if is_layers(key)), 0)  # a model that is a part of another
    prefix = "" if keys[0] in _TUNED else "".join(f"{key}." for key in keys[:within])
    own = path[1:] if keys[0] in _TUNED else path[within:]
    names = official_names(own, parameter.shape[0] + 1 if has_layer_axis(keys) else 1)
    return [prefix + name for name in names]


def check_rates(params: Any, rates: Rates, partition: Callable[[tuple[str, ...]], bool]) -> None:
    """Raises ConfigError for a pattern that names no parameter that is trained."""
    names, frozen = list[str](), list[str]()
    for path, parameter in jax.tree.leaves_with_path(params):
        (names if partition(_keys(path)) else frozen).extend(_names(path, parameter))
    for pattern, _ in rates:
        if not any(matches(name, pattern) for name in names):
            is_frozen = any(matches(name, pattern) for name in frozen)
            require(not is_frozen, "optimizer.rates", pattern, "the run does not train this parameter; leave it out")
            known = dict.fromkeys(form for name in names for form in list(_forms(name))[-2:])
            require_known(pattern, known, "optimizer.rates", "parameter")


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path)


def without_frozen(
    partition: Callable[[tuple[str, ...]], bool], params: Any, rates: Rates
) -> Callable[[tuple[str, ...]], bool]:
    """The partition without the parameters all of whose layers have the factor zero.

    Raises:
      ConfigError: a pattern names no parameter that is trained.
    """
    if not rates:
        return partition
    check_rates(params, rates, partition)
    factors = jax.tree.leaves_with_path(rate_factors(params, rates))
    frozen = {_keys(path) for path, factor in factors if not np.any(factor)}
    return lambda path: path not in frozen and partition(path)


def learning_layers(params: Any, rates: Rates) -> Any:
    """A nested dict like the parameters: True, or bool [layers, 1, ...] where some of the layers are frozen.

    None if no layer is.
    """
    found = jax.tree.map(lambda factor: np.not_equal(factor, 0), rate_factors(params, rates))
    return None if all(np.all(each) for each in jax.tree.leaves(found)) else found


def scaled(update: Array, factor: float | NDArray[np.float64]) -> Array:
    """An update times its factor."""
    return update * (factor if isinstance(factor, float) else jnp.asarray(factor, update.dtype))


def keep_frozen(learns: Any) -> optax.GradientTransformation:
    """Takes the updates of frozen layers back: they become -0.0, which leaves the bits of every number as they are."""

    def keep(update: Array, learns: Any) -> Array:
        return update if np.all(learns) else jnp.where(jnp.asarray(learns), update, jnp.asarray(-0.0, update.dtype))

    return optax.stateless(lambda updates, _: jax.tree.map(keep, updates, learns))


def without_frozen_layers(gradients: Any, learns: Any) -> Any:
    """Gradients with zeros in the place of those of frozen layers."""

    def masked(gradient: Array, learns: Any) -> Array:
        return gradient if np.all(learns) else jnp.where(jnp.asarray(learns), gradient, jnp.zeros_like(gradient))

    return jax.tree.map(masked, gradients, learns)
