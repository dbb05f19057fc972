"""Configs as nested dicts, the form stored in run folders."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from rwkv_jax.checks import require
from rwkv_jax.config.run import TrainConfig


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`, also after a JSON round trip; missing fields take their defaults.

    Raises:
      ConfigError: an unknown field or an invalid value.
    """
    return _from_dict(TrainConfig, values, "")


def _from_dict(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    require(not unknown, prefix + ", ".join(unknown), [values[name] for name in unknown], "no such field")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _from_dict(types[name], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        arguments[name] = _tuples(value)
    return kind(**arguments)


def _tuples(value: Any) -> Any:
    """Converts lists to tuples at any depth, since JSON has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
