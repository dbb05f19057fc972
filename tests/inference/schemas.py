"""Random JSON schemas, each with a check of what it describes that shares no code with any parser of schemas."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Check = Callable[[Any], bool]
NAMES = ("a", "b", "name", "x y", 'quote"', "é")


def random_schema(draws: np.random.Generator, depth: int = 2) -> tuple[dict[str, Any], Check]:
    """A schema whose texts are bounded in length, and whether a parsed value is one of them."""
    simple = (_null, _boolean, _integer, _text, _pattern, _enum)
    kinds = (*simple, *(2 * (_array, _object, _any_of) if depth else ()))
    return kinds[draws.integers(len(kinds))](draws, depth - 1)


def _null(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    return {"type": "null"}, lambda value: value is None


def _boolean(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    return {"type": "boolean"}, lambda value: type(value) is bool


def _integer(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    low = int(draws.integers(-1000, 1000))
    high = low + int(draws.integers(2000))
    return {
        "type": "integer",
        "minimum": low,
        "maximum": high,
    }, lambda value: type(value) is int and low <= value <= high


def _text(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    low = int(draws.integers(3))
    high = low + int(draws.integers(6))
    return {
        "type": "string",
        "minLength": low,
        "maxLength": high,
    }, lambda value: isinstance(value, str) and low <= len(value) <= high


def _pattern(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    pattern = ("^[a-c]{2,5}$", "^(19|20)[0-9]{2}-[01][0-9]$", "^x?y{1,3}$")[draws.integers(3)]
    return {
        "type": "string",
        "pattern": pattern,
    }, lambda value: isinstance(value, str) and re.search(pattern, value) is not None


def _enum(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    values = [(1, "one", None, True, 2.5, "zwei")[i] for i in draws.choice(6, draws.integers(1, 5), replace=False)]
    return {"enum": values}, lambda value: any(type(value) is type(other) and value == other for other in values)


def _array(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    items, check = random_schema(draws, depth)
    low = int(draws.integers(2))
    high = low + int(draws.integers(3))
    return {
        "type": "array",
        "items": items,
        "minItems": low,
        "maxItems": high,
    }, lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(check, value))


def _object(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    names = [NAMES[i] for i in draws.choice(len(NAMES), draws.integers(4), replace=False)]
    of_names = {name: random_schema(draws, depth) for name in names}
    required = [name for name in names if draws.integers(2)]
    schema = {
        "type": "object",
        "properties": {name: own for name, (own, _) in of_names.items()},
        "required": required,
        "additionalProperties": False,
    }
    return (
        schema,
        lambda value: (
            isinstance(value, dict)
            and set(required) <= set(value) <= set(names)
            and all(of_names[name][1](own) for name, own in value.items())
        ),
    )


def _any_of(draws: np.random.Generator, depth: int) -> tuple[dict[str, Any], Check]:
    choices = [random_schema(draws, depth) for _ in range(draws.integers(1, 4))]
    return {"anyOf": [schema for schema, _ in choices]}, lambda value: any(check(value) for _, check in choices)
