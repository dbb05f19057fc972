"""Costs of a compiled XLA program on one device: FLOPs, memory traffic, collectives; loops by their trip counts."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from rwkv_jax.plan.kernels import bfloat16_flops
from rwkv_jax.plan.program import Array, Computation, Instruction, Module
from rwkv_jax.plan.replica_groups import Groups, integers, parse_groups

CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all"]
KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)
_OPCODES: Mapping[str, CollectiveKind] = {name: kind for kind in KINDS for name in (kind, f"{kind}-start")}
_OTHER_OPCODES = ("ragged-all-to-all", "collective-broadcast", "send", "recv")
"""Other communication opcodes, which a training step does not have; they are refused."""
_HIGHEST = re.compile(r"operand_precision=\{[^}]*highest|\"operand_precision\":\[[^\]]*HIGHEST")
"""Full precision, as a dot and as a cuBLAS call write it."""

Precision = Literal["bfloat16", "float32 default", "float32 highest"]
"""Of a matrix product: 16-bit inputs; wider inputs at the platform's default (TF32, or one pass of bfloat16); wider
inputs in full."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: CollectiveKind
    groups: Groups
    """For a collective-permute, pairs of sender and receiver."""
    bytes: int
    """Of the whole array that one execution gathers, reduces, exchanges or permutes, on one device."""
    executions: int

    @property
    def group_size(self) -> int:
        """Devices in the largest group."""
        return max(map(len, self.groups))

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends in all executions, by ring algorithms."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return round(self.executions * self.bytes * factor)


def find_collectives(module: Module, num_devices: int) -> tuple[Collective, ...]:
    """All collectives between two or more devices; start and done of an asynchronous one count once.

    Args:
      num_devices: of the mesh; all take part in a collective without groups.

    Raises:
      ValueError: an unknown kind of collective.
    """
    found = []
    for computation, instruction, executions in module.running():
        is_to_host = "is_host_transfer=true" in instruction.attributes
        if instruction.opcode.removesuffix("-start") in _OTHER_OPCODES and not is_to_host:
            raise ValueError(f"{instruction.name}: what a {instruction.opcode} sends is not known")
        kind = _OPCODES.get(instruction.opcode)
        if kind is None or _is_later_part(computation, instruction):
            continue
        size = sum(array.bytes for array in computation.operand_arrays(instruction))
        groups = parse_groups(instruction.attributes, num_devices)
        collective = Collective(kind, groups, size, executions)
        if kind == "all-gather":  # the operand is one device's shard
            collective = dataclasses.replace(collective, bytes=size * collective.group_size)
        if collective.group_size > 1:
            found.append(collective)
    return tuple(found)


def _is_later_part(computation: Computation, instruction: Instruction) -> bool:
    """Whether this repeats a collective that a TPU runs asynchronously beside matrix products.

    Such a collective appears several times in the program, only the first time beside an AsyncCollectiveStart.
    """
    if '"async_collective_fusion_config"' not in instruction.attributes:
        return False
    return not any("AsyncCollectiveStart" in other.attributes for other in computation.instructions.values())


def product_flops(module: Module) -> dict[Precision, int]:
    """FLOPs of all matrix products by precision; a multiply-add is 2."""
    flops: collections.Counter[Precision] = collections.Counter()
    for computation, instruction, executions in module.running():
        for precision, count in _own_flops(computation, instruction).items():
            flops[precision] += executions * count
    return dict(flops)


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> dict[Precision, int]:
    """FLOPs of one instruction's products by precision; a fusion has those inside it."""
    flops = collections.Counter(_own_flops(computation, instruction))
    for name in instruction.called("calls") if instruction.opcode == "fusion" else ():
        for inner in module.computations[name].instructions.values():
            flops.update(instruction_flops(module, module.computations[name], inner))
    return dict(flops)


def _own_flops(computation: Computation, instruction: Instruction) -> dict[Precision, int]:
    if of_kernel := bfloat16_flops(computation, instruction):
        return {"bfloat16": of_kernel}
    count = _product_flops(computation, instruction)
    if not count:
        return {}
    if all(array.bits <= 16 for array in computation.operand_arrays(instruction)[:2]):
        return {"bfloat16": count}
    is_full = _HIGHEST.search(instruction.attributes) is not None
    return {"float32 highest" if is_full else "float32 default": count}


def _product_flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        contracted = instruction.attribute("lhs_contracting_dims") or ""
    elif instruction.opcode == "custom-call" and re.search(r'target="[^"]*(gemm|matmul)', instruction.attributes):
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = found[1].replace('"', "") if found else ""
    elif instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    else:
        return 0
    left = computation.operand_arrays(instruction)[0]
    sizes = [left.dims[dim] for dim in integers(contracted)] if contracted else []
    return 2 * instruction.results[0].size * math.prod(sizes)


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a convolution: TPU programs write matmuls so, batched ones with dilated spatial axes."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    if labels is None:
        raise ValueError(f"convolution {instruction.name}: no dim_labels in {instruction.attributes[:200]!r}")
    arrays = (*computation.operand_arrays(instruction)[:2], instruction.results[0])
    left, right, out = (dict(zip(names, x.dims, strict=True)) for names, x in zip(labels.groups(), arrays, strict=True))
    window = dict(part.split("=") for part in (instruction.attribute("window") or "").split())
    count = 2 * out["b"] * out["f"] * right["i"]
    for position, name in enumerate(sorted(right.keys() - {"i", "o"})):

        def of(field: str, default: str, position: int = position) -> str:
            return window[field].split("x")[position] if field in window else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, left_dilation, right_dilation = (int(of(x, "1")) for x in ("stride", "lhs_dilate", "rhs_dilate"))
        positions = np.arange(out[name])[:, None] * stride + np.arange(right[name])[None] * right_dilation - low
        read = (positions % left_dilation == 0) & (positions >= 0) & (positions < left[name] * left_dilation)
        count *= int(read.sum())
    return count


_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
}
"""Instructions without memory traffic of their own; some call computations that have it."""


def memory_traffic(module: Module) -> int:
    """Bytes read from and written to the device's main memory, without caches.

    Each instruction outside fusions reads its operands and writes its results; where only a slice of an array is read,
    or updated in place, the slice counts.
    """
    traffic = 0
    for computation, instruction, executions in module.running():
        if computation.name not in module.fused and not is_free(instruction):
            traffic += executions * instruction_traffic(module, computation, instruction)
    return traffic


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction takes no time of its own."""
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction communicates."""
    return instruction.opcode in _OPCODES


def instruction_traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction outside fusions reads and writes; see `memory_traffic`."""
    results, operands = instruction.results, computation.operand_arrays(instruction)
    if instruction.opcode.endswith("-start") or instruction.opcode == "dynamic-slice":
        return 2 * _main_memory(results[:1])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _main_memory(operands[1:2])
    if instruction.opcode == "gather":
        return 2 * _main_memory(results)
    if instruction.opcode == "fusion":
        return _fusion_traffic(module.computations[instruction.called("calls")[0]], operands, results)
    return _main_memory(operands) + _main_memory(results)


def _main_memory(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.memory_space == 0)


_VIEWS = {"bitcast", "reshape", "transpose", "copy", "convert"}
"""Instructions inside a fusion that only move or convert elements."""


def _fusion_traffic(inside: Computation, operands: Sequence[Array], results: Sequence[Array]) -> int:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in inside.instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction)

    def read(name: str, whole: int) -> int:
        return min(sum(read_by(user, name, whole) for user in users[name]), whole)

    def read_by(user: Instruction, name: str, whole: int) -> int:
        if user.opcode in _VIEWS:
            return read(user.name, whole)
        is_first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and is_first:
            return user.results[0].bytes
        return 0 if user.opcode == "dynamic-update-slice" and is_first else whole

    def written(name: str, whole: int) -> int:
        instruction = inside.instructions[name]
        while instruction.opcode in _VIEWS:
            instruction = inside.instructions[instruction.operands[0]]
        if instruction.opcode != "dynamic-update-slice":
            return whole
        return inside.instructions[instruction.operands[1]].results[0].bytes

    parameters = {int(x.arguments): x.name for x in inside.instructions.values() if x.opcode == "parameter"}
    root = inside.instructions[inside.root]
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    reads = (read(parameters[index], x.bytes) for index, x in enumerate(operands) if x.memory_space == 0)
    writes = (written(name, x.bytes) for name, x in zip(outputs, results, strict=False) if x.memory_space == 0)
    return sum(reads) + sum(writes)
