"""The table of what is where."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from rwkv_jax.parallel.placement import memory_by_group, memory_table

MESH: Any = AbstractMesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def array(shape: tuple[int, ...], *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec)))


GROUP = {
    "matrix": array((8, 16), "tensor", "fsdp"),
    "low rank": array((3, 16), None, ("tensor", "fsdp")),
    "v": array((5,)),
}


def test_a_device_holds_its_shards() -> None:
    found = memory_by_group("group", GROUP)
    assert found.whole == 4 * (8 * 16 + 3 * 16 + 5)
    assert found.per_device == 4 * (2 * 8 + 3 * 2 + 5)
    assert found.split_over == ("fsdp", "tensor")


def test_table_has_a_line_for_each_group_and_one_for_all() -> None:
    one = jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16, sharding=SingleDeviceSharding(jax.devices()[0]))
    table = memory_table({"weights": GROUP, "state": None, "tokens": one})
    assert table.splitlines() == [
        "            whole  a device  split over",
        "  weights   724 B     108 B  fsdp tensor",
        "  tokens     2 MB      2 MB",
        "  together   2 MB      2 MB",
    ]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (999_900, "1 MB"), (123_456, "123 kB"), (10**15, "1 PB")]
)
def test_sizes_are_written_with_three_digits(size: int, text: str) -> None:
    whole = jax.ShapeDtypeStruct((size,), jnp.int8, sharding=SingleDeviceSharding(jax.devices()[0]))
    assert memory_table({"x": whole}).splitlines()[1].split("  ")[-1].strip() == text
