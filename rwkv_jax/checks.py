"""ConfigError, and the checks of values that raise it. Standard library only."""

from __future__ import annotations

import difflib
import functools
import numbers
import operator
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any


class ConfigError(ValueError):
    """An invalid value; the message names the field, the value and the remedy."""


_SHOWN = 500  # characters of a value in a message


def shown(value: object) -> str:
    """A value for a message: its repr on one line, cut if long; its type if it has none, as of a huge integer."""
    try:
        text = repr(value).replace("\n", " ")
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raises ConfigError with the field, its value and the remedy unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} = {shown(value)}: {remedy}")


def require_known(name: object, known: Collection[str], field: str, kind: str) -> None:
    """Raises ConfigError, with the names nearest to it and all that there are, for a name that is not known."""
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{field} = {shown(name)}: no such {kind}; {meant}there are {', '.join(known) or 'none'}")


def checker(config: object, section: str = "") -> Callable[[bool, str, str], None]:
    """Makes `require` for a config's fields, from (condition, name of the field, remedy).

    Args:
      section: the part of a run's config that this is; precedes the field in messages.
    """

    def check(condition: bool, field: str, remedy: str) -> None:
        require(condition, f"{section}.{field}".lstrip("."), operator.attrgetter(field)(config), remedy)

    return check


def require_positive(config: object, prefix: str, *fields: str) -> None:
    """Raises ConfigError for the first of the given fields that is zero, negative or not a number."""
    for name in fields:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than zero")


def require_choices(config: object, prefix: str) -> None:
    """Raises ConfigError for the first field with a `Literal` type and a value that it does not list."""
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        *most, last = map(str, choices)
        require(value in choices, f"{prefix}.{name}", value, f"must be {', '.join(most)} or {last}")


@functools.cache
def _choices(section: type) -> dict[str, list[object]]:
    """The allowed values of each field with a `Literal` type, or `Literal | None`."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if all(kind is types.NoneType or typing.get_origin(kind) is typing.Literal for kind in kinds):
            found[name] = [value for kind in kinds for value in typing.get_args(kind) or (None,)]
    return found


def require_whole(field: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raises ConfigError unless the value is an integer within these bounds, inclusive."""
    bounds = f"not less than {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    within = is_whole(value) and minimum <= int(value) and (maximum is None or int(value) <= maximum)
    require(within, field, value, f"must be a whole number, {bounds}")


def require_counts(**values: Sequence[int]) -> None:
    """Raises ConfigError, with the name, for a number below 1 or an empty sequence."""
    for name, counts in values.items():
        if not counts or min(counts) < 1:
            raise ConfigError(f"{name} = {' '.join(map(str, counts))}: must be at least 1 each, and one at least")


def is_number(value: object) -> bool:
    """Whether a value is a real number, including NumPy's, excluding booleans."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is an integer, including NumPy's, excluding booleans."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
