"""Configs as nested dicts, the form stored in run folders."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from rwkv_jax.checks import is_number, require
from rwkv_jax.config.application import ApplicationConfig, application_type
from rwkv_jax.config.run import TrainConfig

APPLICATION = "application"
"""The name beside the fields of an application's config."""

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
_LARGEST = 2**63 - 1


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, ready for JSON."""
    named = {APPLICATION: config.application} if isinstance(config, ApplicationConfig) else {}
    return named | dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`, also after a JSON round trip; missing fields take their defaults.

    Raises:
      ConfigError: an unknown field, a value of another type or an invalid one.
    """
    if not isinstance(values, Mapping) or APPLICATION not in values:
        return dataclass_from_dict(TrainConfig, values, "")
    kind = application_type(values[APPLICATION])
    return dataclass_from_dict(kind, {name: value for name, value in values.items() if name != APPLICATION}, "")


def dataclass_from_dict(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass of this kind from the values of its fields, as `from_dict`; `prefix` precedes fields in messages."""
    is_object = isinstance(values, Mapping) and all(isinstance(name, str) for name in values)
    require(is_object, prefix.rstrip(".") or "config", values, "must be an object: fields and their values")
    hints = typing.get_type_hints(kind)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - hints.keys())
    require(not unknown, prefix + ", ".join(unknown), [values[name] for name in unknown], "no such field")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = dataclass_from_dict(hints[name], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            value = _tuples(value)
            require(_fits(value, hints[name]), f"{prefix}{name}", value, f"must be {_described(hints[name])}")
        arguments[name] = value
    return kind(**arguments)


def _tuples(value: Any) -> Any:
    """Converts lists to tuples at any depth, since JSON has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field. What a `Literal` lists is checked by the config itself."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(items) == len(value) and all(map(_fits, value, items))
    if isinstance(value, int) and abs(value) > _LARGEST:
        return False
    return is_number(value) if hint is float else type(value) is hint


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        each = [_described(argument) for argument in arguments if argument is not ...]
        return f"a list of {', then '.join(each)}"
    return _TYPES.get(hint, str(hint))
