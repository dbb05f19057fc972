"""What a compiled training step takes and costs on devices that need not be there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rwkv_jax.parallel.mesh import MeshShape
from rwkv_jax.plan.costs import (
    Collective,
    CollectiveKind,
    Precision,
    find_collectives,
    memory_traffic,
    product_flops,
)
from rwkv_jax.plan.devices import Device, Platform, Topology
from rwkv_jax.plan.program import parse_module
from rwkv_jax.plan.replica_groups import mesh_axes

ON_HOST = "pinned_host"
"""JAX's name of the memory of a device's host from which it can read."""

USABLE_SHARE: Mapping[Platform, float] = {"cuda": 0.95, "tpu": 1.0, "cpu": 1.0}
"""Of a device's memory. The rest of a GPU's goes to the driver, to NCCL and to gaps between arrays; a TPU's compiler
keeps its own share back, and refuses what does not fit."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does, counted by hand."""

    tokens: int
    model_flops: int
    """Of forward and backward passes over all devices: what model FLOPs utilization (MFU) is measured by."""
    recomputed_flops: int
    """Which rematerialization adds, at most."""
    dtype: str
    """Of the matrix products: bfloat16 or float32."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes of the step's arguments on one device."""

    groups: Mapping[str, int]
    """By what they are, from shapes and shardings alone."""
    padding: int = 0
    """What the compiler's layouts add to them; none but on TPUs."""
    compiled: int | None = None
    """The compiler's own account of their sum with the padding; None where it refused."""
    on_host: int = 0
    """Of their sum with the padding what lies in the host's memory: an offloaded optimizer."""

    @property
    def total(self) -> int:
        """Of all groups, without padding."""
        return sum(self.groups.values())


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind along the same mesh axes, in one step, on one device."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    across_hosts: bool
    group_size: int
    count: int
    bytes: int
    """Of the whole arrays that are gathered, reduced, exchanged or handed on."""
    sent_bytes: int
    """What the device sends, by ring algorithms."""
    seconds: float
    """The time for that over links that do nothing else: an estimate, since some algorithms send less than a ring."""


@dataclasses.dataclass(frozen=True)
class Floors:
    """Least times of a step, in seconds, each as if the others cost nothing; `interconnect` is only an estimate."""

    arithmetic: float
    """The model's FLOPs, counted by hand, at the dtype's peak."""
    products: float
    """The compiled program's matrix products, recomputation included, each at its precision's peak."""
    memory: float
    """Every argument in the device's memory read once and every result written once. What an offloaded optimizer
    costs on its way from the host and back is in none of these."""
    interconnect: float
    """All collectives, one after the other, by ring algorithms. Better ones exist: hierarchical ones between hosts, and
    reductions inside the switches."""

    @property
    def largest(self) -> tuple[str, float]:
        """The name and the seconds of the highest floor."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiled program takes and does on one device in one step.

    Loops are counted as often as they run, and of a conditional every branch.
    """

    results: int
    """Bytes of results that do not take an argument's place."""
    temporary: int
    """Bytes of intermediate arrays at the worst moment."""
    code: int
    """Bytes of the program itself, where it lies in the device's memory."""
    product_flops: Mapping[Precision, int]
    traffic: int
    """Bytes that instructions read and write in the device's memory, if nothing stays in a cache."""
    collectives: tuple[CollectiveTotal, ...]
    unknown_loops: tuple[str, ...]
    """Loops that were counted once, their trip count being unknown."""
    chosen_loops: tuple[str, ...]
    """Loops whose first or last turn the data choose out of two, the larger of which was counted. In the chunked
    operators of RWKV-5 and 6 that is the faster of two loops, which runs while no decay is strong."""
    floors: Floors


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a topology."""

    topology: str
    mesh: Mapping[str, int]
    device: Device
    work: Work
    arguments: Arguments
    program: Program | None
    """None where the compiler refused."""
    refusal: str | None = None
    """Why it did: a TPU's compiler does, where the program takes more memory than there is."""
    idle_devices: int = 0
    """Of the topology: those that cannot share the rows evenly."""

    @property
    def peak(self) -> int | None:
        """Bytes of one device at the worst moment; None where the compiler refused."""
        if self.program is None:
            return None
        program, arguments = self.program, self.arguments
        return (
            arguments.total + arguments.padding - arguments.on_host + program.results + program.temporary + program.code
        )

    @property
    def fits(self) -> bool:
        """Whether the step fits into what a program can use of the device's memory."""
        return self.peak is not None and self.peak <= self.usable_memory

    @property
    def usable_memory(self) -> int:
        """Bytes of a device's memory that a program can use."""
        return int(USABLE_SHARE[self.device.platform] * self.device.memory)

    @property
    def tokens_per_second(self) -> float | None:
        """What the highest floor allows, over all devices."""
        return None if self.program is None else self.work.tokens / self.program.floors.largest[1]

    @property
    def mfu(self) -> float | None:
        """The highest model FLOPs utilization that the highest floor allows."""
        return None if self.program is None else self.program.floors.arithmetic / self.program.floors.largest[1]


class Compiled(NamedTuple):
    """A compiled step."""

    executable: Any
    """`jax.jit(step).lower(...).compile()`."""
    text: str
    """Of its program, as its compiler wrote it."""


def make_plan(
    topology: Topology,
    mesh: Mesh | None,
    work: Work,
    arguments: tuple[Any, ...],
    groups: Mapping[str, Any],
    compiled: Compiled | None,
    refusal: str | None = None,
) -> Plan:
    """The plan of a compiled step.

    Args:
      mesh: None for one device.
      arguments: the step's arguments as shapes with shardings, as it was lowered with them.
      groups: the same leaves by what they are.
      compiled: None where the compiler refused; `refusal` is its reason.
    """
    bytes_by_group = {name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in groups.items()}
    sizes = dataclasses.asdict(MeshShape()) if mesh is None else dict(mesh.shape)
    if compiled is None:
        found, program = Arguments(bytes_by_group), None
    else:
        formats = jax.tree.leaves(compiled.executable.input_formats)
        leaves = jax.tree.leaves(arguments)
        padded = [padded_bytes(x, y.layout) for x, y in zip(leaves, formats, strict=True)]
        memory = compiled.executable.memory_analysis()
        found = Arguments(
            bytes_by_group,
            padding=sum(padded) - sum(map(shard_bytes, leaves)),
            compiled=memory.argument_size_in_bytes + memory.host_argument_size_in_bytes,
            on_host=sum(size for x, size in zip(leaves, padded, strict=True) if x.sharding.memory_kind == ON_HOST),
        )
        hosts = [0] if mesh is None else [device.process_index for device in mesh.devices.flat]
        program = _read_program(compiled, topology.device, sizes, hosts, work)
    idle = topology.num_devices - math.prod(sizes.values())
    return Plan(str(topology), sizes, topology.device, work, found, program, refusal, idle)


def shard_bytes(leaf: Any) -> int:
    """Bytes of a leaf's part on one device, from its shape, dtype and sharding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def padded_bytes(leaf: Any, layout: Any) -> int:
    """The same as it lies in memory: a TPU stores arrays as tiles, and fills up those at the edges."""
    if layout is None or not layout.tiling:
        return shard_bytes(leaf)
    shard = leaf.sharding.shard_shape(leaf.shape)
    sizes = [shard[axis] for axis in layout.major_to_minor]
    for tile in layout.tiling:
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        whole, tiled = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
        sizes = [*whole, *(-(-size // step) for size, step in zip(tiled, tile, strict=True)), *tile]
    return math.prod(sizes) * leaf.dtype.itemsize


def _read_program(
    compiled: Compiled, device: Device, axis_sizes: Mapping[str, int], hosts: Sequence[int], work: Work
) -> Program:
    memory = compiled.executable.memory_analysis()
    module = parse_module(compiled.text)
    flops = product_flops(module)
    collectives = total_collectives(find_collectives(module, len(hosts)), device, axis_sizes, hosts)
    peaks: Mapping[Precision, float] = {
        "bfloat16": device.bfloat16,
        "float32 default": device.float32_default,
        "float32 highest": device.float32_highest,
    }
    peak = device.bfloat16 if work.dtype == "bfloat16" else device.float32_default
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Program(
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        product_flops=flops,
        traffic=memory_traffic(module),
        collectives=collectives,
        unknown_loops=module.unknown_loops,
        chosen_loops=module.chosen_loops,
        floors=Floors(
            arithmetic=work.model_flops / len(hosts) / peak,
            products=sum(count / peaks[precision] for precision, count in flops.items()),
            memory=moved / device.memory_bandwidth,
            interconnect=sum(total.seconds for total in collectives),
        ),
    )


def total_collectives(
    collectives: Sequence[Collective], device: Device, axis_sizes: Mapping[str, int], hosts: Sequence[int]
) -> tuple[CollectiveTotal, ...]:
    """Collectives added up by kind, mesh axes and whether they leave the host.

    Args:
      hosts: of each device, by its position in the mesh.
    """

    def key(collective: Collective) -> tuple[CollectiveKind, tuple[str, ...], bool, int]:
        across = any(len({hosts[member] for member in group}) > 1 for group in collective.groups)
        axes = mesh_axes(collective.groups, axis_sizes)
        return collective.kind, axes, across and device.platform == "cuda", collective.group_size

    def total(key: tuple[CollectiveKind, tuple[str, ...], bool, int], same: Sequence[Collective]) -> CollectiveTotal:
        return CollectiveTotal(
            *key,
            count=sum(x.executions for x in same),
            bytes=sum(x.executions * x.bytes for x in same),
            sent_bytes=sum(x.sent_bytes for x in same),
            seconds=sum(x.sent_bytes / bandwidth(x, device, hosts) for x in same),
        )

    grouped = itertools.groupby(sorted(collectives, key=key), key)
    return tuple(total(name, list(same)) for name, same in grouped)


def bandwidth(collective: Collective, device: Device, hosts: Sequence[int]) -> float:
    """Bytes a second that a device can send in a collective, the other groups sending as much.

    Between hosts a ring passes through the network cards of all members of a host, and so the more of them it has on
    each, the faster it is, up to the links inside. The chips of a TPU slice have links of their own to each other.
    """
    if device.platform != "cuda":
        return device.link_bandwidth
    slowest = device.link_bandwidth
    for group in collective.groups:
        members = [hosts[member] for member in group]
        if len(set(members)) > 1:
            slowest = min(slowest, device.host_bandwidth * min(map(members.count, members)))
    return slowest
