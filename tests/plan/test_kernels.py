"""The formulas of kernels: bytes against the arrays that they get, FLOPs against the products that they compile to."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rwkv_kernels
from rwkv_jax.plan.costs import product_flops
from rwkv_jax.plan.kernels import BACKWARD, CHUNKS, FORWARD, KERNELS, TPU_KERNELS, Sizes, kernel_cost
from rwkv_jax.plan.program import parse_module
from tests.golden import QUICK

BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM = 1, 256, 2, 16, 32
OPERATORS = ["wkv4", "wkv5", "wkv6", "wkv7"]


def arguments(operator: str, key_dim: int = KEY_DIM, value_dim: int = VALUE_DIM) -> tuple[Any, ...]:
    """An implementation's arguments in order: bfloat16, with decays in float32, and the state."""
    sizes = {"B": BATCH, "T": TIME, "H": HEADS, "N": key_dim, "M": value_dim, "C": 64}
    axes = rwkv_kernels.OPERATORS[operator].axes

    def array(letters: str, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([sizes[letter] for letter in letters if letter != " "], dtype)

    inputs = (array(letters, jnp.float32 if name == "log_w" else jnp.bfloat16) for name, letters in axes.items())
    state = (array("BC", jnp.float32),) * 3 if operator == "wkv4" else array("BHMN", jnp.float32)
    return *inputs, state


def differentiated(operator: str, implementation: str) -> Any:
    run = functools.partial(rwkv_kernels.OPERATORS[operator].implementations[implementation].run, interpret=True)

    def gradients(*given: Any) -> Any:
        outputs, pull_back = jax.vjp(run, *given)
        return pull_back(outputs)

    return gradients


def kernels(jaxpr: Any) -> Iterator[Any]:
    """Calls of kernels in a program, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for part in equation.params.values():
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                yield from kernels(inner)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bytes_are_those_of_the_arrays_that_kernels_read_and_write(operator: str) -> None:
    found = list(kernels(jax.make_jaxpr(differentiated(operator, KERNELS))(*arguments(operator)).jaxpr))
    assert len(found) == 2
    sizes = Sizes(*((1, 1) if operator == "wkv4" else (KEY_DIM, VALUE_DIM)), CHUNKS[KERNELS][operator])
    token_heads = BATCH * TIME * (64 if operator == "wkv4" else HEADS)
    over_time = {name for name, letters in rwkv_kernels.OPERATORS[operator].axes.items() if "T" in letters}
    item_bytes = {name: 4 if name == "log_w" else 2 for name in over_time}
    for call, direction in zip(found, (FORWARD, BACKWARD), strict=True):
        arrays = [x.aval for x in (*call.invars, *call.outvars) if TIME in x.aval.shape or x.aval.ndim >= 3]
        arrays = [x for x in arrays if x.shape != (BATCH, HEADS, VALUE_DIM, KEY_DIM)]  # states of whole rows
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        cost = kernel_cost(operator, direction, sizes, item_bytes)
        assert cost.bytes == pytest.approx(size / token_heads, rel=0.01), [str(x) for x in arrays]


@pytest.mark.parametrize(
    ("operator", "implementation"), [("wkv5", KERNELS), ("wkv6", KERNELS), ("wkv7", KERNELS), ("wkv7", TPU_KERNELS)]
)
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_products_are_those_of_the_compiled_kernels(operator: str, implementation: str, direction: str) -> None:
    given = arguments(operator)
    run = differentiated(operator, implementation)
    if direction == FORWARD:
        run = functools.partial(rwkv_kernels.OPERATORS[operator].implementations[implementation].run, interpret=True)
    compiled = jax.jit(run).lower(*given).compile(compiler_options=QUICK)
    found = sum(product_flops(parse_module(compiled.as_text() or "")).values()) / (BATCH * TIME * HEADS)
    sizes = Sizes(KEY_DIM, VALUE_DIM, CHUNKS[implementation][operator])
    item_bytes = dict.fromkeys(rwkv_kernels.OPERATORS[operator].axes, 2)
    both = [kernel_cost(operator, x, sizes, item_bytes) for x in {FORWARD, direction}]
    once = 0.04 if operator == "wkv5" else 1e-6  # what it computes before its loop over chunks
    assert found == pytest.approx(sum(cost.products + cost.sums for cost in both), rel=once)
