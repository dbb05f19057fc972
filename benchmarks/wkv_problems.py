"""What the operator benchmarks share: inputs of any size, a call with its backward pass, medians of turns."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import rwkv_kernels
from rwkv_kernels.testing.cases import Shape

Inputs = dict[str, Any]
"""Arguments by name; WKV-4's state is a tuple."""


def make_inputs(operator: str, shape: Shape, case: str = "realistic") -> Inputs:
    """A case of an operator, float64 arrays that float32 holds exactly."""
    return importlib.import_module(f"rwkv_kernels.ops.{operator}.cases").make_inputs(case, shape)


def as_dtype(inputs: Inputs, dtype: Any) -> Inputs:
    """Inputs on the device: states in float32 at least, all else in dtype."""
    at_least = jnp.promote_types(dtype, jnp.float32)
    return {
        name: jax.tree.map(lambda x, to=at_least if name == "state" else dtype: jnp.asarray(x, to), x)
        for name, x in inputs.items()
    }


def call(operator: str, implementation: Any, **options: Any) -> Callable[[Inputs], Any]:
    """Inputs -> (y, final state)."""
    run = getattr(rwkv_kernels, operator)
    return lambda inputs: run(**inputs, implementation=implementation, **options)


def with_backward(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """y and the final state of a call, and their pull-back of themselves to every input."""

    def run(inputs: Inputs) -> Any:
        outputs, pull_back = jax.vjp(function, inputs)
        return outputs, pull_back(outputs)[0]

    return run


def medians(
    functions: Mapping[str, Callable[[Any], Any]], arguments: Mapping[str, Any], repetitions: int
) -> dict[str, float]:
    """Median milliseconds of each function; repetitions take turns, after one of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function(arguments[name]))
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
