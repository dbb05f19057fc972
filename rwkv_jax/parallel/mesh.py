"""Device meshes with axes data, fsdp, sequence and tensor: their shapes and how `auto` sizes are chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rwkv_jax.config import ConfigError, ParallelConfig, TrainConfig

AXES = ("data", "fsdp", "sequence", "tensor")
"""The mesh's axes, outermost first. Consecutive devices are neighbors along `tensor`, which communicates most."""

BYTES_PER_PARAMETER = 16
"""A parameter, its gradient and Adam's two moments, in float32."""

_SHARE_FOR_STATE = 0.5
"""Share of a device's memory for parameters, gradients and optimizer; the rest is for activations."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(dataclasses.astuple(self))

    def __str__(self) -> str:
        """As `data 2 x fsdp 4`, without axes of size 1."""
        named = [f"{name} {size}" for name, size in dataclasses.asdict(self).items() if size > 1]
        return " x ".join(named) or "one device"


def choose_shape(
    parallel: ParallelConfig, num_devices: int, *, num_parameters: int, rows: int, device_memory: int | None
) -> MeshShape:
    """Chooses the mesh's shape, with sizes for the axes that are `auto`.

    `fsdp` gets the smallest size at which parameters, gradients and optimizer take at most half of each device's
    memory; `data` gets the remaining devices.

    Args:
      rows: of a micro-batch, split over data and fsdp.
      device_memory: bytes of one device; None if unknown, and `auto` fsdp is then 1.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not divide the rows.
    """
    given = {name: getattr(parallel, name) for name in AXES}
    fixed = math.prod(size for size in given.values() if size != "auto")
    if num_devices % fixed:
        raise ConfigError(
            f"parallel: {_named(given)} take a multiple of {fixed} devices, but there are {num_devices}; sizes that "
            f"divide it are {', '.join(map(str, divisors(num_devices)))}, or leave parallel.data to auto"
        )
    remaining = num_devices // fixed
    if given["fsdp"] == "auto":
        shards = 1.0 if given["data"] == "auto" else remaining
        if given["data"] == "auto" and device_memory is not None:
            needed = BYTES_PER_PARAMETER * num_parameters / given["tensor"]  # bytes of a device without fsdp
            shards = needed / (_SHARE_FOR_STATE * device_memory)
        given["fsdp"] = next((size for size in divisors(remaining) if size >= shards), remaining)
        remaining //= given["fsdp"]
    if given["data"] == "auto":
        given["data"] = remaining
        remaining = 1
    if remaining != 1:
        raise ConfigError(
            f"parallel: {_named(given)} take {num_devices // remaining} devices, but there are {num_devices}; leave "
            "parallel.data to auto, or let the sizes multiply to their number"
        )
    shape = MeshShape(**given)
    check_rows(shape, rows)
    return shape


def check_rows(shape: MeshShape, rows: int) -> None:
    """Raises ConfigError if data and fsdp do not divide a micro-batch's rows."""
    ways = shape.data * shape.fsdp
    if rows % ways:
        nearest = " or ".join(map(str, nearest_multiples(rows, ways)))
        raise ConfigError(
            f"training.batch_size: {rows} rows at a time (batch_size / accumulation_steps) cannot be shared by "
            f"data {shape.data} x fsdp {shape.fsdp} = {ways} devices; the nearest sizes are {nearest}, or give "
            "parallel.sequence or parallel.tensor some of the devices"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest_multiples(number: int, divisor: int) -> list[int]:
    """The positive multiples of a divisor just below and just above a number that is none."""
    below = number // divisor * divisor
    return [size for size in (below, below + divisor) if size]


def _named(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def mesh_from_shape(shape: MeshShape, devices: Sequence[Any]) -> Mesh:
    """Makes a mesh; neighbors in it are neighbors in the hardware where JAX knows the topology.

    Raises:
      ConfigError: another number of devices, or a shape that cannot be laid out on them.
    """
    if shape.size != len(devices):
        raise ConfigError(f"parallel: {shape} takes {shape.size} devices, but there are {len(devices)}")
    sizes = tuple(getattr(shape, name) for name in AXES)
    try:
        placed = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    except (
        NotImplementedError,
        ValueError,
        AssertionError,
    ) as error:  # JAX cannot split the torus so
        raise ConfigError(
            f"parallel: {shape} cannot be laid out on these {len(devices)} devices ({error}); take other sizes"
        ) from error
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_mesh(config: TrainConfig, devices: Sequence[Any], device_memory: int | None = None) -> Mesh | None:
    """Makes the mesh of a run; None for one device.

    If data and fsdp are `auto` and one process has all devices, only as many are used as divide the rows evenly.

    Args:
      device_memory: bytes of one device, the same in all processes; None if unknown.

    Raises:
      ConfigError: as `choose_shape`.
    """
    parallel = config.parallel
    rows = config.training.batch_size // config.training.accumulation_steps
    usable = len(devices)
    if parallel.data == parallel.fsdp == "auto" and len({device.process_index for device in devices}) == 1:
        usable = usable_devices(parallel, usable, rows)
    num_parameters = config.model.num_parameters()
    shape = choose_shape(parallel, usable, num_parameters=num_parameters, rows=rows, device_memory=device_memory)
    return mesh_from_shape(shape, devices[:usable]) if usable > 1 else None


def usable_devices(parallel: ParallelConfig, num_devices: int, rows: int) -> int:
    """The largest number of devices that divides the rows evenly, given tensor and sequence."""
    each = parallel.tensor * parallel.sequence
    if num_devices % each:
        return num_devices  # which `choose_shape` refuses
    return next((ways * each for ways in range(num_devices // each, 0, -1) if rows % ways == 0), num_devices)


def mesh_shape(mesh: Mesh) -> MeshShape:
    """The shape of a mesh that `mesh_from_shape` made."""
    return MeshShape(**{name: mesh.shape[name] for name in AXES})


def device_memory(device: Any) -> int | None:
    """Bytes that JAX may use on a device of this process; None if the device does not say, as CPUs do not."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None


def default_device() -> Any:
    """The device on which this process creates arrays."""
    settings: Any = jax.config  # its type does not declare its settings
    chosen = settings.jax_default_device  # a device, or the name of a platform
    return jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
