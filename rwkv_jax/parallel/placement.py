"""What is where: a table of the bytes that each device holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from rwkv_jax.tables import format_table

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class GroupMemory(NamedTuple):
    """A group of arrays, as a whole and on one device."""

    group: str
    whole: int
    """Bytes."""
    per_device: int
    """Bytes of the shards that one device holds."""
    split_over: tuple[str, ...]
    """Mesh axes that split at least one of the arrays."""


def memory_by_group(group: str, arrays: Any) -> GroupMemory:
    """What a device holds of a tree of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(arrays)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    per_device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    names = {
        name
        for x in leaves
        if isinstance(x.sharding, NamedSharding)
        for entry in x.sharding.spec
        for name in ((entry,) if isinstance(entry, str) else entry or ())
    }
    return GroupMemory(group, whole, per_device, tuple(sorted(names)))


def memory_table(groups: dict[str, Any]) -> str:
    """A line for each group of arrays: its bytes, those on each device, and what splits it.

    Args:
      groups: trees of arrays, or of shapes with shardings, by name; None and empty ones are left out.
    """
    rows = [memory_by_group(name, arrays) for name, arrays in groups.items() if jax.tree.leaves(arrays)]
    rows.append(GroupMemory("together", sum(row.whole for row in rows), sum(row.per_device for row in rows), ()))
    table = [("", "whole", "a device", "split over")]
    table += [(row.group, _bytes(row.whole), _bytes(row.per_device), " ".join(row.split_over)) for row in rows]
    return format_table(table, "<>><")


def _bytes(number: int) -> str:
    """As 12.3 MB."""
    size, units = float(number), iter(_UNITS)
    unit = next(units)
    while size >= 999.5:  # which would be written as 1e+03
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"
