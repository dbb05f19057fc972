"""Replica groups: which devices take part in a collective of a compiled XLA program."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""Groups of devices, each device by its position in the mesh."""

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=(?P<groups>\{(?:\{[\d,]*\},?)*\})")
_NUMBERED = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=(?P<numbers>\[[\d,]+\](?:T\([\d,]+\))?)(?=[,\s]|$)")
_MESH = re.compile(
    r"replica_groups=@?mesh[\[<](?P<axes>[^\]>]*)[\]>](?:, device_ids=\((?P<numbers>[^{]*)\))? \{(?P<along>[^}]*)\}"
)
_AXIS = re.compile(r"'?(?P<name>\w+)'?(?::\((?P<before>\d+)\)(?P<size>\d+))?")


def parse_groups(attributes: str, num_devices: int) -> Groups:
    """Parses a collective's groups in any of XLA's forms.

    Listed, `{{0,2},{1,3}}`; iota, `[2,2]<=[2,2]T(1,0)`; or along mesh axes, `mesh['a'=2,'b'=2] {'a'}`.

    Args:
      attributes: the text after an instruction's operands.
      num_devices: of the mesh; all take part in a collective without groups.

    Raises:
      ValueError: no groups, or an unknown form.
    """
    if found := _LISTED.search(attributes):
        listed = re.findall(r"\{([\d,]+)\}", found["groups"])
        return tuple(integers(group) for group in listed) or (tuple(range(num_devices)),)
    if found := _NUMBERED.search(attributes):
        return _rows(_numbers(found["numbers"]).reshape(integers(found["shape"])))
    if found := _MESH.search(attributes):
        return _along_axes(found["axes"], found["numbers"], found["along"])
    raise ValueError(f"no replica groups of a known form in {attributes[:200]!r}")


def integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    return tuple(map(int, text.split(",")))


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in array)


def _numbers(text: str) -> np.ndarray:
    """Parses `[2,4]T(1,0)` (an iota of this shape, transposed) or the numbers themselves."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.array(integers(text))
    shape = integers(found[1])
    order = integers(found[2]) if found[2] else tuple(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order)


def _along_axes(axes: str, numbers: str | None, along: str) -> Groups:
    sizes = {name.strip("' "): int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    count = math.prod(sizes.values())
    devices = np.arange(count) if numbers is None else _numbers(numbers).reshape(-1)
    # An axis of which only a part is used, 'a':(2)4, is split in three: before the part, the part, after it.
    wanted = {found["name"]: found for found in _AXIS.finditer(along)}
    shape: list[int] = []
    taking_part: list[int] = []
    for name, size in sizes.items():
        found = wanted.get(name)
        if found is None:
            shape.append(size)
        elif found["size"] is None:
            taking_part.append(len(shape))
            shape.append(size)
        else:
            before, part = int(found["before"]), int(found["size"])
            taking_part.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
    others = [axis for axis in range(len(shape)) if axis not in taking_part]
    members = math.prod(shape[axis] for axis in taking_part)
    return _rows(devices.reshape(shape).transpose(others + taking_part).reshape(-1, members))


def mesh_axes(groups: Sequence[Sequence[int]], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ, in mesh order.

    Args:
      groups: devices by their position in the mesh.
      axis_sizes: of the mesh, the fastest-varying axis last.
    """
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(axis_sizes.values())), tuple(axis_sizes.values())))
    differ = np.zeros(len(axis_sizes), bool)
    for group in groups:
        members = coordinates[:, list(group)]
        differ |= (members != members[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(axis_sizes, differ, strict=True) if differs)
