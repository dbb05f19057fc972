"""Every field whose type lists its values refuses all others, by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import pytest

import rwkv_jax.config
from rwkv_jax.config import ConfigError, StepConfig, TrainConfig

SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(TrainConfig)}


def lists_its_values(hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(kind) is typing.Literal for kind in kinds) and not {str, int} & set(kinds)


FIELDS = [
    (section, kind, name)
    for section, kind in SECTIONS.items()
    if isinstance(kind, type)
    for name, hint in typing.get_type_hints(kind).items()
    if lists_its_values(hint)
]


def test_the_fields_are_found() -> None:
    assert {(section, name) for section, _, name in FIELDS} >= {
        ("model", "architecture"),
        ("model", "dtype"),
        ("data", "order"),
        ("optimizer", "schedule"),
        ("training", "remat"),
    }
    sections = {kind for kind in vars(rwkv_jax.config).values() if dataclasses.is_dataclass(kind)}
    others = sections - {TrainConfig, *SECTIONS.values()}
    assert not [kind for kind in others if any(map(lists_its_values, typing.get_type_hints(kind).values()))]


@pytest.mark.parametrize(("section", "kind", "name"), FIELDS)
def test_a_value_that_is_not_listed_is_refused(section: str, kind: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{section}\.{name} = 'bogus': must be \w+(, \w+)* or \w+$"):
        kind(**{name: "bogus"})


def test_none_is_a_value_only_where_it_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"^training\.remat = None: must be none, operator or full$"):
        StepConfig(remat=None)  # pyright: ignore[reportArgumentType]
