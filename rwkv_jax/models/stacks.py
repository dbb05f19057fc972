"""How a model's layers are held: layer 0 by itself, and every run of equal layers after it as one stack.

A model whose layers 1 to L - 1 are alike has them under `blocks`, with a leading axis L - 1. In a hybrid, whose layers
have mixers of several kinds, layers A to B of one kind are under `blocks_A_B`. Names say which layers they hold, so
that whoever walks through a nested dict of parameters needs no config.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

FIRST = "first_block"
"""Layer 0, whose arrays have no leading axis."""

_STACK = "blocks"


class LayerRun(NamedTuple):
    """Successive layers of one kind."""

    name: str
    """Of the part that holds them: `first_block`, `blocks` or `blocks_A_B`."""
    layers: range
    kind: str
    """As in `GenerationSpec.layer_kinds`."""
    index: int
    """Number of earlier layers of this kind: where the run begins in the kind's state."""


def layer_runs(kinds: Sequence[str]) -> tuple[LayerRun, ...]:
    """The runs of a model's layers, in order.

    Args:
      kinds: of each layer.
    """
    bounds = [0, 1, *(layer for layer in range(2, len(kinds)) if kinds[layer] != kinds[layer - 1]), len(kinds)]
    runs: list[LayerRun] = []
    for begin, end in itertools.pairwise(bounds):
        is_all = (begin, end) == (1, len(kinds))
        name = FIRST if begin == 0 else _STACK if is_all else f"{_STACK}_{begin}_{end - 1}"
        runs.append(LayerRun(name, range(begin, end), kinds[begin], list(kinds[:begin]).count(kinds[begin])))
    return tuple(runs)


def is_stack(part: str) -> bool:
    """Whether a part of a model is stacked layers, whose arrays have a leading axis."""
    return part.partition("_")[0] == _STACK


def is_layers(part: str) -> bool:
    """Whether a part of a model is a layer or stacked layers."""
    return part == FIRST or is_stack(part)


def has_layer_axis(path: Sequence[str]) -> bool:
    """Whether the parameter at a path has a leading axis of layers: is of a stack, also of a model within a model."""
    return any(map(is_stack, path))


def stacked_layers(part: str, num_layers: int) -> range:
    """The layers that a stack holds.

    Args:
      num_layers: L, which `blocks` does not say.
    """
    if part == _STACK:
        return range(1, num_layers)
    _, first, last = part.split("_")
    return range(int(first), int(last) + 1)


class StackedModel(Protocol):
    """What `run_stacks` knows of a model."""

    first_block: Any

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """How layers are stacked."""
        ...

    def states_by_kind(self, state: Any, /) -> dict[str, Any]:
        """The parts of a state that belong to the kinds of layers."""
        ...

    def join_kinds(self, states: dict[str, Any], /) -> Any:
        """The state of its parts."""
        ...


def run_stacks(
    model: StackedModel, x: Array, states: Any, run: Callable[..., Callable[..., Any]], *, every_layer: bool
) -> tuple[Array, Any, Any]:
    """All layers of a model whose layers are stacked.

    Args:
      x: [B, T, C], the input of layer 0.
      states: a state of the model.
      run: from the name of a part and options of `jax.checkpoint` to the function that runs one of its blocks.

    Returns:
      The last layer's output, the next state, and with `every_layer` all layers' outputs [L, B, T, C], otherwise None.
    """
    of_kind = model.states_by_kind(states)
    first, *stacks = model.layer_runs
    first_state = jax.tree.map(lambda s: s[0], of_kind[first.kind])
    of_stacks = [
        jax.tree.map(lambda s, own=stack: s[own.index : own.index + len(own.layers)], of_kind[stack.kind])
        for stack in stacks
    ]
    x_first, v_first, first_state = run(FIRST)(model.first_block, x, first_state, None)

    def body(name: str, x: Array, layer: tuple[Any, Any]) -> tuple[Array, tuple[Any, Any]]:
        # The scan itself keeps XLA from undoing the recomputation; block 0 needs the barriers. The first layer's
        # values are not in the carry, which the backward pass would store once per layer.
        x, _, next_state = run(name, prevent_cse=False)(layer[0], x, layer[1], v_first)
        return x, (next_state, x if every_layer else None)

    x, next_states, streams = x_first, dict[str, list[Any]](), []
    for stack, of_stack in zip(stacks, of_stacks, strict=True):
        layers = (getattr(model, stack.name), of_stack)
        x, (of_stack, of_layers) = jax.lax.scan(functools.partial(body, stack.name), x, layers)
        next_states.setdefault(stack.kind, []).append(of_stack)
        streams.append(of_layers)
    of_first = jax.tree.map(lambda s: s[None], first_state)
    next_states[first.kind] = [of_first, *next_states.get(first.kind, [])]
    joined = {kind: jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts) for kind, parts in next_states.items()}
    return x, model.join_kinds(joined), jnp.concatenate([x_first[None], *streams]) if every_layer else None
