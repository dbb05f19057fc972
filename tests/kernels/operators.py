"""Every operator as the tests in this folder see it: a new operator or implementation is a row here, and no more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_kernels import wkv7, wkv7_step
from rwkv_kernels.wkv7 import IMPLEMENTATIONS as WKV7_IMPLEMENTATIONS
from rwkv_kernels.wkv7 import cases as wkv7_cases
from rwkv_kernels.wkv7.cases import Shape
from tests.golden import QUICK

Inputs = dict[str, Any]
"""Arguments by name; `state` is a tree of arrays, all others are arrays."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator, its implementations and its test cases."""

    name: str
    run: Callable[..., tuple[Array, Any]]
    """(**inputs, implementation) -> (y, state)."""
    step: Callable[..., tuple[Array, Any]]
    """(**inputs without their time axis) -> (y, state)."""
    implementations: tuple[str, ...]
    """`scan`, the definition, comes first."""
    cases: tuple[str, ...]
    make_inputs: Callable[[str, Shape], Inputs]
    """(case, shape) -> float64 inputs which float32 holds exactly."""
    over_time: tuple[str, ...]
    """Inputs [B, T, H, ...]; those of them with a time axis."""
    float32_bound: Callable[[str, str, Shape], float]
    """(implementation, case, shape) -> largest relative error of any result or gradient in float32."""

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


def _wkv7_float32_bound(implementation: str, case: str, shape: Shape) -> float:
    # e^{log w} is rounded before the recurrence multiplies by it, the same way at every step. Where states live long
    # that adds up, and the definition is the worst of all: the chunked form adds logarithms and rounds once a chunk.
    drift = shape.time * 2**-25 if implementation == "scan" and case.endswith("slow_decay") else 0
    return max(5e-6, drift)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="wkv7",
        run=wkv7,
        step=wkv7_step,
        implementations=tuple(WKV7_IMPLEMENTATIONS),
        cases=tuple(wkv7_cases.CASES),
        make_inputs=wkv7_cases.make_inputs,
        over_time=("r", "log_w", "k", "v", "a", "b"),
        float32_bound=_wkv7_float32_bound,
    ),
)

PAIRS: tuple[tuple[Operator, str], ...] = tuple(
    (operator, implementation) for operator in OPERATORS for implementation in operator.implementations
)
"""Every operator with each of its implementations."""

each_pair = pytest.mark.parametrize(
    ("operator", "implementation"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in PAIRS]
)
"""Runs a test with each of them."""

SHAPES: tuple[Shape, ...] = (
    Shape(3, 1, 1, 5, 12),
    Shape(1, 15, 2, 16, 16),
    Shape(3, 16, 2, 8, 8),
    Shape(1, 17, 2, 24, 8),
    Shape(3, 17, 1, 16, 16),
    Shape(1, 257, 1, 64, 64),
    Shape(3, 257, 2, 7, 9),
    Shape(1, 1024, 2, 64, 64),
)
"""One token, one short of a block of 16, a block, one more; several chunks; value sizes that differ from key sizes."""


@functools.cache
def forward(operator: Operator, implementation: str, quick: bool = True) -> Callable[[Inputs], tuple[Array, Any]]:
    """Compiled inputs -> (y, final state)."""
    run = functools.partial(operator.run, implementation=implementation)
    return jax.jit(lambda inputs: run(**inputs), compiler_options=QUICK if quick else None)


@functools.cache
def with_gradients(
    operator: Operator, implementation: str, quick: bool = True
) -> Callable[[Inputs, Any], dict[str, Array]]:
    """Compiled (inputs, cotangents of y and of the final state) -> results and gradients, by name."""
    run = functools.partial(operator.run, implementation=implementation)
    return jax.jit(functools.partial(differentiate, run), compiler_options=QUICK if quick else None)


def differentiate(run: Callable[..., tuple[Array, Any]], inputs: Inputs, cotangents: Any) -> dict[str, Array]:
    """Results of run(**inputs) and the gradients that the cotangents make, by name."""
    (y, state), pull_back = jax.vjp(lambda inputs: run(**inputs), inputs)
    return _named(y, state, pull_back(cotangents)[0])


def _named(y: Array, state: Any, gradients: Inputs) -> dict[str, Array]:
    leaves = {f"state{jax.tree_util.keystr(path)}": x for path, x in jax.tree.leaves_with_path(state)}
    paths = jax.tree.leaves_with_path(gradients)
    return {"y": y} | leaves | {f"d{jax.tree_util.keystr(path, simple=True)}": x for path, x in paths}


def make_cotangents(operator: Operator, inputs: Inputs) -> tuple[NDArray, Any]:
    """Random cotangents of y and of the final state, float64 with values that float32 holds."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(operator.run, **inputs)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32).astype(np.float64), shapes)


@functools.cache
def problem(operator: Operator, case: str, shape: Shape) -> tuple[Inputs, tuple[NDArray, Any]]:
    """A case's inputs and cotangents."""
    inputs = operator.make_inputs(case, shape)
    return inputs, make_cotangents(operator, inputs)


@functools.cache
def reference(operator: Operator, case: str, shape: Shape) -> dict[str, NDArray]:
    """What the definition gives for a case in float64: results and gradients, by name."""
    with jax.enable_x64(True):
        results = with_gradients(operator, "scan")(*problem(operator, case, shape))
        return {name: np.asarray(x) for name, x in results.items()}


def cut(operator: Operator, inputs: Inputs, start: int | None, stop: int | None) -> Inputs:
    """Steps [start, stop) of inputs."""
    return inputs | {name: inputs[name][:, start:stop] for name in operator.over_time}


def at(operator: Operator, inputs: Inputs, step: int) -> Inputs:
    """One step of inputs, without its time axis."""
    return inputs | {name: inputs[name][:, step] for name in operator.over_time}


def as_jax(tree: Any, dtype: Any) -> Any:
    """A tree of arrays on the device, in dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
