"""Runs a function on several sets of arguments in lockstep, so that what need not wait for each other is neighbors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex


def in_lockstep(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """[function(*arguments) for arguments in calls], each operation for all calls before the next one.

    A compiler that keeps close to a program's order, as Mosaic does, then overlaps the calls' chains of products.

    Args:
      function: of arrays, in trees; without `custom_vjp` calls.
      calls: arguments of the same shapes and dtypes.
    """
    if len(calls) == 1:
        return [function(*calls[0])]
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*calls[0])
    variables = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    known = [dict(zip(variables, [*closed.consts, *jax.tree.leaves(call)], strict=True)) for call in calls]

    def read(values: dict[Any, Any], atoms: Sequence[Any]) -> list[Any]:
        return [x.val if isinstance(x, jex.Literal) else values[x] for x in atoms]

    for equation in closed.jaxpr.eqns:
        for values in known:
            results = equation.primitive.bind(*read(values, equation.invars), **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            values.update(zip(equation.outvars, results, strict=True))
    tree = jax.tree.structure(shapes)
    return [jax.tree.unflatten(tree, read(values, closed.jaxpr.outvars)) for values in known]
