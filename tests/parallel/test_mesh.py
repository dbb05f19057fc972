"""The mesh that a run gets: sizes that are given, sizes that are chosen, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_jax.config import ConfigError, ModelConfig, ParallelConfig, StepConfig, TrainConfig
from rwkv_jax.parallel.mesh import MeshShape, choose_shape, make_mesh, mesh_from_shape, usable_devices

GIB = 2**30


def choose(
    num_devices: int, *, rows: int = 64, memory: int | None = None, parameters: int = 10**6, **sizes: Any
) -> MeshShape:
    return choose_shape(
        ParallelConfig(**sizes), num_devices, num_parameters=parameters, rows=rows, device_memory=memory
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, MeshShape(data=8)),
        ({"fsdp": 4}, MeshShape(data=2, fsdp=4)),
        ({"tensor": 2}, MeshShape(data=4, tensor=2)),
        ({"data": 2}, MeshShape(data=2, fsdp=4)),
        ({"data": 2, "fsdp": 1, "sequence": 4}, MeshShape(data=2, sequence=4)),
        ({"data": 1, "fsdp": "auto", "sequence": 2, "tensor": 2}, MeshShape(fsdp=2, sequence=2, tensor=2)),
    ],
)
def test_sizes_that_are_left_out_take_what_remains(sizes: dict[str, Any], expected: MeshShape) -> None:
    assert choose(8, **sizes) == expected


@pytest.mark.parametrize(
    ("parameters", "tensor", "fsdp"),
    [(10**9, 1, 1), (5 * 10**9, 1, 2), (14 * 10**9, 1, 8), (14 * 10**9, 2, 4), (10**12, 1, 64)],
)
def test_weights_are_scattered_no_further_than_memory_asks(parameters: int, tensor: int, fsdp: int) -> None:
    """16 bytes a parameter, in half of 80 GiB."""
    shape = choose(64, memory=80 * GIB, parameters=parameters, tensor=tensor)
    assert (shape.fsdp, shape.size) == (fsdp, 64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "take a multiple of 3 devices, but there are 8; sizes that divide it are 1, 2, 4, 8"),
        ({"data": 2, "fsdp": 2}, "take 4 devices, but there are 8; leave parallel.data to auto"),
        ({"tensor": 16}, "take a multiple of 16 devices, but there are 8"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(8, **sizes)


def test_rows_that_cannot_be_shared_are_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(ConfigError, match=r"12 rows at a time.* the nearest sizes are 8 or 16"):
        choose(8, rows=12)
    with pytest.raises(ConfigError, match="the nearest sizes are 8,"):
        choose(8, rows=4)


@pytest.mark.parametrize(
    ("rows", "sizes", "used"), [(4, {}, 4), (12, {}, 6), (5, {}, 5), (1, {"sequence": 4}, 4), (2, {"tensor": 2}, 4)]
)
def test_devices_that_cannot_share_the_rows_stay_idle(rows: int, sizes: dict[str, Any], used: int) -> None:
    assert usable_devices(ParallelConfig(**sizes), 8, rows) == used


def test_devices_that_heads_or_time_do_not_divide_are_no_reason_to_leave_some_out() -> None:
    assert usable_devices(ParallelConfig(tensor=3), 8, 64) == 8
    with pytest.raises(ConfigError, match="take a multiple of 3 devices, but there are 8"):
        choose(8, tensor=3)


def test_a_mesh_takes_as_many_devices_as_its_shape() -> None:
    with pytest.raises(ConfigError, match="data 2 x tensor 3 takes 6 devices, but there are 1"):
        mesh_from_shape(MeshShape(data=2, tensor=3), [object()])


def test_one_device_is_no_mesh() -> None:
    import jax

    config = TrainConfig(model=ModelConfig(width=64), training=StepConfig(batch_size=4))
    assert make_mesh(config, jax.devices()[:1]) is None


@pytest.mark.parametrize(("device_memory", "used"), [(1 << 40, "data 8"), (1 << 20, "fsdp 8"), (None, "data 8")])
def test_fsdp_is_chosen_by_the_memory_that_is_given(
    device_memory: int | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shape_alone(shape: MeshShape, devices: list[Any]) -> MeshShape:  # JAX makes no mesh of what is no device
        assert len(devices) == 8
        return shape

    monkeypatch.setattr("rwkv_jax.parallel.mesh.mesh_from_shape", shape_alone)
    config = TrainConfig(model=ModelConfig(width=64), training=StepConfig(batch_size=8))
    devices = [SimpleNamespace(process_index=0)] * 8
    assert str(make_mesh(config, devices, device_memory)) == used


def test_a_sequence_that_its_axis_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"training.sequence_length = 512: must be a multiple of parallel.sequence = 3"
    ):
        TrainConfig(parallel=ParallelConfig(sequence=3))
