"""What a reply to the first line of a function is worth, by its syntax: nothing of it is run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any


def parses(record: Mapping[str, Any], reply: str) -> bool:
    """Whether the line and the reply are one function of Python, which has more than a docstring, and nothing else."""
    return _function(record, reply) is not None


def uses(record: Mapping[str, Any], reply: str) -> float:
    """Share of the function's arguments that its body reads; 1 if it has none, 0 if it is no function."""
    function = _function(record, reply)
    if function is None:
        return 0.0
    parameters = function.args
    named = {each.arg for each in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)}
    named |= {each.arg for each in (parameters.vararg, parameters.kwarg) if each is not None}
    read = {
        node.id
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return len(named & read) / len(named) if named else 1.0


def _function(record: Mapping[str, Any], reply: str) -> ast.FunctionDef | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            statements = ast.parse(f"{record['prompt']}{reply}").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too deep nesting is one of the last two
        return None
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        return None
    function = statements[0]
    return None if len(function.body) == 1 and ast.get_docstring(function) is not None else function
