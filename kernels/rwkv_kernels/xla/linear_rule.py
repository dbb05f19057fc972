"""Hand-written backward passes that still allow forward-mode differentiation, which `jax.custom_vjp` does not.

The tangent map of an operator is one linear primitive. Evaluated, it is JAX's derivative of the forward pass;
transposed, it is the hand-written backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rwkv_kernels.arguments import broadcast_varying_axes

Flat = Sequence[jax.Array]
"""A flat sequence of arrays, as primitives take them."""

_linear_p = Primitive("rwkv_linear")
_linear_p.multiple_results = True


def _split(arguments: Flat, sizes: tuple[int, int]) -> tuple[Flat, Flat]:
    return arguments[: sizes[0]], arguments[sizes[0] :]


def _run(
    *arguments: jax.Array, tangent: Callable[..., Flat], cotangent: Callable[..., Flat], sizes: Any, types: Any
) -> Flat:
    del cotangent, types
    return list(tangent(*_split(arguments, sizes)))


@_linear_p.def_impl
def _evaluate(*arguments: jax.Array, **params: Any) -> Flat:
    return jax.jit(functools.partial(_run, **params))(*arguments)


@_linear_p.def_abstract_eval
def _types(*arguments: Any, types: Any, **params: Any) -> Any:
    """Those of the outputs, where they are known: tracing the derivative for them was a fifth of tracing a step."""
    if types is not None:
        return types
    return jax.make_jaxpr(functools.partial(_run, types=None, **params))(*arguments).out_avals


def _transpose(
    cotangents: Flat, *arguments: Any, tangent: Any, cotangent: Callable[..., Flat], sizes: Any, types: Any
) -> Flat:
    del tangent, types
    residuals, _ = _split(arguments, sizes)
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * sizes[0] + list(cotangent(residuals, cotangents))


def _batch(arguments: Flat, axes: Sequence[int | None], *, tangent: Any, cotangent: Any, sizes: Any, types: Any) -> Any:
    del types
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments, axes, strict=True)
    ]
    of_rows = {"tangent": jax.vmap(tangent), "cotangent": jax.vmap(cotangent)}
    results = _linear_p.bind(*moved, **of_rows, sizes=sizes, types=None)
    return results, [0] * len(results)


def _differentiate(primals: Flat, tangents: Flat, **params: Any) -> tuple[Flat, Flat]:
    """Higher derivatives: JAX differentiates the tangent map."""
    tangents = [ad.instantiate_zeros(x) for x in tangents]
    return jax.jvp(lambda *x: _run(*x, **params), tuple(primals), tuple(tangents))


ad.primitive_jvps[_linear_p] = _differentiate
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))


def with_backward(
    forward: Callable[..., Any],
    forward_with_residuals: Callable[..., tuple[Any, Any]],
    backward: Callable[[Any, Any, Any, Any], tuple],
) -> Callable[..., Any]:
    """A function of trees of floating arrays with a hand-written backward pass; forward mode is JAX's.

    Args:
      forward: (constants, *inputs) -> outputs, with forward-mode derivatives. The constants, a tree of arrays, have no
        gradients.
      forward_with_residuals: (constants, *inputs) -> (the same outputs, what backward needs).
      backward: (constants, inputs, residuals, cotangents of outputs) -> cotangents of inputs, a tuple.

    Returns:
      The function (constants, *inputs) -> outputs. It must close over no tracers. Forward mode computes the outputs a
      second time, with their tangents.
    """

    @jax.custom_jvp
    def run(constants: Any, *inputs: Any) -> Any:
        return forward(constants, *inputs)

    @run.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        constants, *inputs = primals
        outputs, residuals = forward_with_residuals(constants, *inputs)
        saved, saved_tree = jax.tree.flatten((constants, tuple(inputs), residuals))
        flat_tangents, inputs_tree = jax.tree.flatten(tangents[1:])
        flat_outputs, outputs_tree = jax.tree.flatten(outputs)

        def tangent(saved: Flat, flat_tangents: Flat) -> Flat:
            constants, inputs, _ = jax.tree.unflatten(saved_tree, saved)
            tangents = jax.tree.unflatten(inputs_tree, flat_tangents)
            return jax.tree.leaves(jax.jvp(functools.partial(forward, constants), inputs, tangents)[1])

        def cotangent(saved: Flat, cotangents: Flat) -> Flat:
            constants, inputs, residuals = jax.tree.unflatten(saved_tree, saved)
            return jax.tree.leaves(backward(constants, inputs, residuals, jax.tree.unflatten(outputs_tree, cotangents)))

        results = _linear_p.bind(
            *saved,
            *flat_tangents,
            tangent=tangent,
            cotangent=cotangent,
            sizes=(len(saved), len(flat_tangents)),
            types=tuple(jax.typeof(x) for x in flat_outputs),
        )
        return outputs, jax.tree.unflatten(outputs_tree, results)

    def call(constants: Any, *inputs: Any) -> Any:
        return run(*broadcast_varying_axes(constants, *inputs))

    return call
