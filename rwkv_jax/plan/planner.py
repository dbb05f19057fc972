"""Plans of a compiled training step: memory, FLOPs, collectives and lower bounds of its time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rwkv_jax.parallel.mesh import MeshShape
from rwkv_jax.parallel.placement import shard_bytes
from rwkv_jax.plan.costs import Collective, CollectiveKind, Precision, find_collectives, memory_traffic, product_flops
from rwkv_jax.plan.devices import Device, Platform, Topology
from rwkv_jax.plan.kernels import uncounted_kernels
from rwkv_jax.plan.program import parse_module
from rwkv_jax.plan.replica_groups import mesh_axes
from rwkv_jax.plan.step_time import Estimate, OperatorCalls, predict

ON_HOST = "pinned_host"
"""JAX's memory kind for host memory that a device can read."""

USABLE_SHARE: Mapping[Platform, float] = {"cuda": 0.95, "tpu": 1.0, "cpu": 1.0}
"""Share of a device's memory that a program can use. The rest of a GPU's is for the driver, NCCL and fragmentation; a
TPU's compiler accounts for its own reserve and refuses what does not fit."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one step over all devices, from the config alone."""

    tokens: int
    model_flops: int
    """Of forward and backward pass: the basis of model FLOPs utilization (MFU)."""
    recomputed_flops: int
    """What rematerialization adds, at most."""
    dtype: str
    """Of the matrix products: bfloat16 or float32."""
    operator: OperatorCalls | None = None
    """None for a model without a WKV operator."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes of the step's arguments on one device."""

    groups: Mapping[str, int]
    """By name, from shapes and shardings."""
    padding: int = 0
    """What the compiler's layouts add; only on TPUs."""
    compiled: int | None = None
    """The compiler's total, with padding; None where it refused."""
    on_host: int = 0
    """What of that total lies in host memory: an offloaded optimizer."""

    @property
    def total(self) -> int:
        """Sum of all groups, without padding."""
        return sum(self.groups.values())


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind along the same mesh axes, per step and device."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    across_hosts: bool
    group_size: int
    count: int
    bytes: int
    """Of the whole arrays that are gathered, reduced, exchanged or permuted."""
    sent_bytes: int
    """What the device sends, by ring algorithms."""
    seconds: float
    """Time to send them over otherwise idle links: an estimate, since some algorithms send less than a ring."""


@dataclasses.dataclass(frozen=True)
class Floors:
    """Lower bounds of a step's time in seconds, each for one resource; `interconnect` is only an estimate."""

    arithmetic: float
    """The model's FLOPs at the dtype's peak."""
    products: float
    """The compiled program's matrix products, with recomputation, each at its precision's peak."""
    memory: float
    """Every argument in device memory read once and every result written once. None of these bounds has the transfers
    of an offloaded optimizer."""
    interconnect: float
    """All collectives one after the other, by ring algorithms. Hierarchical algorithms and in-network reductions are
    faster."""

    @property
    def largest(self) -> tuple[str, float]:
        """Name and seconds of the largest bound."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Program:
    """Costs of the compiled program, per step and device.

    Loops count as often as they run; of a conditional, every branch counts.
    """

    results: int
    """Bytes of results that are not written to a donated argument."""
    temporary: int
    """Peak bytes of intermediate arrays."""
    code: int
    """Bytes of the program itself in device memory."""
    product_flops: Mapping[Precision, int]
    traffic: int
    """Bytes that instructions read and write in device memory, without caches."""
    collectives: tuple[CollectiveTotal, ...]
    unknown_loops: tuple[str, ...]
    """Loops with an unknown trip count, which count once."""
    chosen_loops: tuple[str, ...]
    """Loops whose trip count depends on the data; the larger of its two values is counted. In the chunked operators of
    RWKV-5 and 6 that is the fast loop, which runs as long as no decay is strong."""
    floors: Floors
    estimates: tuple[Estimate, ...] = ()
    """The step's predicted time as compiled, and with kernels for the WKV operator."""
    uncounted_kernels: tuple[str, ...] = ()
    """Kernels whose products are not known, and count nowhere."""


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
    """Its reason: a TPU's compiler refuses programs that do not fit into memory."""
    idle_devices: int = 0
    """Devices of the topology that are in no mesh, since the rows do not divide evenly."""

    @property
    def peak(self) -> int | None:
        """Peak bytes of one device; None where the compiler refused."""
        if self.program is None:
            return None
        program, arguments = self.program, self.arguments
        return (
            arguments.total + arguments.padding - arguments.on_host + program.results + program.temporary + program.code
        )

    @property
    def fits(self) -> bool:
        """Whether the peak is within `usable_memory`."""
        return self.peak is not None and self.peak <= self.usable_memory

    @property
    def usable_memory(self) -> int:
        """Bytes of device memory that a program can use."""
        return int(USABLE_SHARE[self.device.platform] * self.device.memory)

    @property
    def tokens_per_second(self) -> float | None:
        """Upper bound over all devices, from the largest floor."""
        return None if self.program is None else self.work.tokens / self.program.floors.largest[1]

    @property
    def mfu(self) -> float | None:
        """Upper bound of the model FLOPs utilization, from the largest floor."""
        return None if self.program is None else self.program.floors.arithmetic / self.program.floors.largest[1]


class Compiled(NamedTuple):
    """A compiled step."""

    executable: Any
    """`jax.jit(step).lower(...).compile()`."""
    text: str
    """Text of its HLO module."""


def make_plan(
    topology: Topology,
    mesh: Mesh | None,
    work: Work,
    arguments: tuple[Any, ...],
    groups: Mapping[str, Any],
    compiled: Compiled | None,
    refusal: str | None = None,
) -> Plan:
    """Makes the plan of a compiled step.

    Args:
      mesh: None for one device.
      arguments: shapes with shardings, as the step was lowered with them.
      groups: the same leaves, grouped by name.
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


def padded_bytes(leaf: Any, layout: Any) -> int:
    """`shard_bytes` with the padding of a layout: a TPU stores arrays as tiles and fills up those at the edges."""
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
    interconnect = sum(total.seconds for total in collectives)
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
            products=sum(count / device.peaks[precision] for precision, count in flops.items()),
            memory=moved / device.memory_bandwidth,
            interconnect=interconnect,
        ),
        estimates=predict(module, device, interconnect, work.operator),
        uncounted_kernels=uncounted_kernels(module),
    )


def total_collectives(
    collectives: Sequence[Collective], device: Device, axis_sizes: Mapping[str, int], hosts: Sequence[int]
) -> tuple[CollectiveTotal, ...]:
    """Sums of collectives by kind, mesh axes and whether they leave the host.

    Args:
      hosts: of each device, in mesh order.
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
    """Bytes/s that a device can send in a collective while the other groups send as much.

    Between hosts a ring uses the network cards of all its members on a host: the more members per host, the faster, up
    to the bandwidth inside a host. Chips of a TPU slice have direct links.
    """
    if device.platform != "cuda":
        return device.link_bandwidth
    slowest = device.link_bandwidth
    for group in collective.groups:
        members = [hosts[member] for member in group]
        if len(set(members)) > 1:
            slowest = min(slowest, device.host_bandwidth * min(map(members.count, members)))
    return slowest
