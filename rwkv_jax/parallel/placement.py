"""Table of per-device memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from rwkv_jax.parallel.rules import spec_axes
from rwkv_jax.tables import format_table

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class GroupMemory(NamedTuple):
    """Memory of a group of arrays, in bytes."""

    group: str
    whole: int
    per_device: int
    split_over: tuple[str, ...]
    """Mesh axes over which at least one of the arrays is split."""


def memory_by_group(group: str, arrays: Any) -> GroupMemory:
    """Memory of a tree of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(arrays)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    names = (spec_axes(x.sharding.spec) for x in leaves if isinstance(x.sharding, NamedSharding))
    return GroupMemory(group, whole, sum(map(shard_bytes, leaves)), tuple(sorted(set[str]().union(*names))))


def shard_bytes(x: Any) -> int:
    """Bytes of an array's shard on one device, from its shape, dtype and sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def memory_table(groups: dict[str, Any]) -> str:
    """Table with a row for each group of arrays: its size in all and per device, and the mesh axes it is split over.

    Args:
      groups: trees of arrays, or of shapes with shardings, by name; None and empty trees are left out.
    """
    rows = [memory_by_group(name, arrays) for name, arrays in groups.items() if jax.tree.leaves(arrays)]
    rows.append(GroupMemory("together", sum(row.whole for row in rows), sum(row.per_device for row in rows), ()))
    table = [("", "whole", "a device", "split over")]
    table += [(row.group, _bytes(row.whole), _bytes(row.per_device), " ".join(row.split_over)) for row in rows]
    return format_table(table, "<>><")


def _bytes(number: int) -> str:
    """A number of bytes as `12.3 MB`."""
    size, units = float(number), iter(_UNITS)
    unit = next(units)
    while size >= 999.5:  # which would be written as 1e+03
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"
