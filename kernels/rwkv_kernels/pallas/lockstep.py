"""Runs a function on several sets of arguments in lockstep, so that what need not wait for each other is neighbors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

_CUSTOM_RULES = "custom_jvp_call", "custom_vjp_call"
"""Functions with derivatives of their own; nobody differentiates here, so their operations stand in their place."""


def in_lockstep(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """[function(*arguments) for arguments in calls], each operation for all calls before the next one.

    A compiler that keeps close to a program's order, as Mosaic does, then overlaps the calls' chains of products.
    Loops, branches and functions compiled by themselves are one operation each.

    Args:
      function: of arrays, in trees.
      calls: arguments of the same shapes and dtypes.
    """
    if len(calls) == 1:
        return [function(*calls[0])]
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*calls[0])
    tree = jax.tree.structure(shapes)
    return [jax.tree.unflatten(tree, results) for results in _run(closed, [jax.tree.leaves(call) for call in calls])]


def _run(closed: jex.ClosedJaxpr, calls: Sequence[list[Any]]) -> list[list[Any]]:
    """The results of a program for each list of arguments."""
    variables = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    known = [dict(zip(variables, [*closed.consts, *call], strict=True)) for call in calls]

    def read(atoms: Sequence[Any]) -> list[list[Any]]:
        return [[x.val if isinstance(x, jex.Literal) else values[x] for x in atoms] for values in known]

    for equation in closed.jaxpr.eqns:
        given, primitive = read(equation.invars), equation.primitive
        if primitive.name in _CUSTOM_RULES:
            found = _run(equation.params["call_jaxpr"], given)
        else:
            found = [primitive.bind(*arguments, **equation.params) for arguments in given]
            found = found if primitive.multiple_results else [[x] for x in found]
        for values, results in zip(known, found, strict=True):
            values.update(zip(equation.outvars, results, strict=True))
    return read(closed.jaxpr.outvars)
