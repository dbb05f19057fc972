"""Predicted time of a compiled step: each instruction takes the longest of its launch, its traffic and its products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rwkv_jax.models.layers import OPERATOR_SCOPE
from rwkv_jax.plan.costs import instruction_flops, instruction_traffic, is_collective, is_free
from rwkv_jax.plan.devices import Device
from rwkv_jax.plan.kernels import CHUNKS, KERNELS, SPLIT_KERNELS, KernelCost, operator_costs
from rwkv_jax.plan.program import Computation, Instruction, Module, callees


@dataclasses.dataclass(frozen=True)
class OperatorCalls:
    """Calls of the WKV operator in one step, from the config alone."""

    operator: str
    implementation: str
    forwards: int
    """Forward passes of one layer over its tokens, in all layers and micro-batches; with those of recomputation."""
    backwards: int
    token_heads: float
    """Tokens times heads of one such pass, on one device."""
    key_dim: int
    value_dim: int
    item_bytes: Mapping[str, int]
    """Of an element of each input over time."""
    map_value_dim: int = 0
    """On a mesh that splits time, value columns of a second pass each way, for the map of a shard's state; else 0."""
    may_be_measured: bool = False
    """Whether a new run on a GPU or TPU may take another implementation, by measurement."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step's costs on one device with one implementation of the WKV operator."""

    implementation: str
    is_compiled: bool
    """Whether the program was compiled with it; else formulas stand in for the operator's instructions."""
    products: float
    """Seconds of matrix products alone."""
    traffic: float
    """Seconds of memory traffic alone."""
    launches: int
    """Kernels launched, on GPUs; instructions that take time elsewhere."""
    seconds: float
    """Predicted; see the module. Collectives come on top, as if nothing ran beside them."""


class _Cost(NamedTuple):
    products: float
    traffic: float
    launches: int
    seconds: float


def predict(module: Module, device: Device, interconnect: float, calls: OperatorCalls | None) -> tuple[Estimate, ...]:
    """Predicts the step as compiled and, on GPUs, with each of the operator's kernels instead.

    Args:
      interconnect: seconds of all collectives.
      calls: None for a model without an operator.
    """
    parts: dict[bool, _Cost] = {is_operator: _sum(()) for is_operator in (False, True)}
    for is_operator, cost in _instruction_costs(module, device):
        parts[is_operator] = _sum((parts[is_operator], cost))
    compiled = _sum(parts.values())
    name = "" if calls is None else calls.implementation
    found = [Estimate(name, True, *compiled[:3], compiled.seconds + interconnect)]
    if calls is None or device.platform != "cuda":
        return tuple(found)
    for kernels in (KERNELS, SPLIT_KERNELS):
        if calls.operator in CHUNKS[kernels] and calls.implementation != kernels:
            total = _sum((parts[False], _kernels(kernels, calls, device)))
            found.append(Estimate(kernels, False, *total[:3], total.seconds + interconnect))
    return tuple(found)


def _instruction_costs(module: Module, device: Device) -> Iterator[tuple[bool, _Cost]]:
    """Every instruction that takes time, all its executions together, and whether it is the operator's."""
    of_operator, conditions = _operator_computations(module), _conditions(module)
    for computation, instruction, executions in module.running():
        if computation.name in module.fused or computation.name in conditions or is_free(instruction):
            continue
        flops = instruction_flops(module, computation, instruction)
        products = sum(count / device.peaks[precision] for precision, count in flops.items())
        traffic = instruction_traffic(module, computation, instruction) / device.memory_bandwidth
        seconds = max(device.launch, traffic, products)
        if is_collective(instruction):  # the interconnect's share is reckoned elsewhere
            seconds = device.launch
        is_operator = computation.name in of_operator or _is_operator(instruction)
        yield is_operator, _Cost(executions * products, executions * traffic, executions, executions * seconds)


def _is_operator(instruction: Instruction) -> bool:
    return OPERATOR_SCOPE in instruction.attributes


def _operator_computations(module: Module) -> set[str]:
    """Computations that run within the operator: bodies of its loops, which have instructions without a scope."""
    found: set[str] = set()
    pending = [x for computation in module.computations.values() for x in _callers(computation) if _is_operator(x)]
    while pending:
        for name in set(callees(pending.pop())) - found:
            found.add(name)
            pending += _callers(module.computations[name])
    return found


def _callers(computation: Computation) -> list[Instruction]:
    return [x for x in computation.instructions.values() if callees(x)]


def _conditions(module: Module) -> set[str]:
    """Conditions of loops with a known trip count, which a GPU need not compute."""
    loops = (x for computation in module.computations.values() for x in computation.instructions.values())
    return {name for x in loops if "known_trip_count" in x.attributes for name in x.called("condition")}


def _kernels(implementation: str, calls: OperatorCalls, device: Device) -> _Cost:
    """The operator by its kernels: what they read and write, and their products in passes of bfloat16."""

    def cost(one: KernelCost, count: int) -> _Cost:
        products = calls.token_heads * one.bfloat16_flops("full") / device.bfloat16
        traffic = calls.token_heads * one.bytes / device.memory_bandwidth
        seconds = max(device.launch, products, traffic)
        return _Cost(count * products, count * traffic, count, count * seconds)

    def passes(value_dim: int) -> Iterator[_Cost]:
        forward, backward = operator_costs(implementation, calls.operator, calls.key_dim, value_dim, calls.item_bytes)
        yield from (cost(one, calls.forwards) for one in forward)
        yield from (cost(one, calls.backwards) for one in backward)

    value_dims = [x for x in (calls.value_dim, calls.map_value_dim) if x]
    return _sum(cost for value_dim in value_dims for cost in passes(value_dim))


def _sum(costs: Iterable[_Cost]) -> _Cost:
    costs = tuple(costs)
    return _Cost(
        products=sum(cost.products for cost in costs),
        traffic=sum(cost.traffic for cost in costs),
        launches=sum(cost.launches for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
    )
