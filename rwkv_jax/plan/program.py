"""Parser of optimized HLO text: computations, instructions, and how often each is executed.

Reads `compiled.as_text()` for CPUs, GPUs and TPUs. XLA's own cost analysis counts the body of a loop once; here it
counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Bits per element of dtypes whose name does not tell (a predicate takes a byte)."""
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,<= ]*)\](?P<layout>\{[^{}]*\})?")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype, shape and memory space of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0
    """0 is the device's main memory; others are on-chip or host memory."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits per element."""
        if self.dtype in BITS:
            return BITS[self.dtype]
        return int(re.findall(r"\d+", self.dtype)[0])  # f32, s8, u4, f8e4m3fn

    @property
    def bytes(self) -> int:
        """Bytes of the array, without padding."""
        return -(-self.size * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    """One array, or the leaves of a (nested) tuple in order."""
    operands: tuple[str, ...]
    """Names of instructions in the same computation."""
    arguments: str
    """The text between the parentheses."""
    attributes: str
    """The text after the parentheses."""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute such as `dimensions={0}`, without braces, or None."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^\s,]+)", self.attributes)
        return found[1].strip("{}") if found else None

    def called(self, name: str) -> tuple[str, ...]:
        """Computations named by an attribute such as `calls=%f` or `branch_computations={%f, %g}`."""
        text = self.attribute(name)
        return tuple(part.strip().removeprefix("%") for part in text.split(",")) if text else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operand_arrays(self, instruction: Instruction) -> tuple[Array, ...]:
        """The arrays that an instruction reads."""
        found = (self.instructions[name].results for name in instruction.operands if name in self.instructions)
        return tuple(array for results in found for array in results)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, as one device runs it."""

    computations: Mapping[str, Computation]
    entry: str
    executions: Mapping[str, int]
    """How often each computation runs per execution of the program; loops in `unknown_loops` count once."""
    unknown_loops: tuple[str, ...]
    """Loops with an unknown trip count."""
    chosen_loops: tuple[str, ...]
    """Loops whose trip count is one of two values, chosen by the data; the larger one is counted."""

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside fusions: their intermediate results are never in memory."""
        instructions = (x for computation in self.computations.values() for x in computation.instructions.values())
        fusions = (x for x in instructions if x.opcode in ("fusion", "fusion-start"))
        return frozenset(name for x in fusions for name in x.called("calls"))

    def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, with its computation and how often it runs."""
        for name, times in self.executions.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values() if times else ():
                yield computation, instruction, times


def parse_module(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if name:
            if line.startswith("}"):
                computations[name] = Computation(name, instructions, root)
                name, root, instructions = "", "", {}
            elif found := _INSTRUCTION.fullmatch(line):
                instruction = _parse_instruction(found["name"], found["rest"])
                instructions[instruction.name] = instruction
                root = instruction.name if found["root"] else root
        elif found := _HEADER.fullmatch(line):
            name = found["name"]
            entry = name if found["entry"] else entry
    if entry not in computations:
        raise ValueError("no entry computation: this is not the text of a compiled XLA program")
    return _count_executions(computations, entry)


def _count_executions(computations: Mapping[str, Computation], entry: str) -> Module:
    counts: collections.Counter[str] = collections.Counter()
    unknown: dict[str, None] = {}
    chosen: dict[str, None] = {}

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in computations[name].instructions.values():
            trips = 1
            if instruction.opcode == "while":
                found = trip_count(computations, computations[name], instruction)
                if found is None:
                    unknown[instruction.name] = None
                elif found.chosen_by_data:
                    chosen[instruction.name] = None
                trips = 1 if found is None else found.value
            for callee in callees(instruction):
                visit(callee, times * trips)

    visit(entry, 1)
    return Module(computations, entry, counts, tuple(unknown), tuple(chosen))


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    found = _OPCODE.match(rest, end)
    if found is None:
        raise ValueError(f"instruction {name}: no opcode in {rest[:200]!r}")
    closing = _closing(rest, found.end() - 1)
    arguments = rest[found.end() : closing]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, found["opcode"], parse_arrays(rest[:end]), operands, arguments, rest[closing + 1 :])


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Parses the arrays of a type such as `(f32[2,3]{1,0}, s32[])`."""

    def array(found: re.Match[str]) -> Array:
        dims = tuple(int(size.strip("<= ")) for size in found["dims"].split(",") if size.strip())
        space = re.search(r"S\((\d+)\)", found["layout"] or "")
        return Array(found["dtype"], dims, int(space[1]) if space else 0)

    return tuple(map(array, _ARRAY.finditer(text)))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis never closes: {text[start : start + 200]!r}")


def callees(instruction: Instruction) -> tuple[str, ...]:
    """Computations that an instruction executes; not the scalar reducers of reductions."""
    if instruction.opcode == "while":
        return instruction.called("body") + instruction.called("condition")
    if instruction.opcode in ("call", "call-start"):
        return instruction.called("to_apply")
    if instruction.opcode == "conditional":  # every branch counts
        names = ("branch_computations", "true_computation", "false_computation")
        return tuple(callee for name in names for callee in instruction.called(name))
    if instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
        return instruction.called("calls")
    return ()


@dataclasses.dataclass(frozen=True)
class Number:
    """An integer found in the program's text."""

    value: int
    chosen_by_data: bool
    """Whether it is the larger of two values between which the data choose."""


def trip_count(computations: Mapping[str, Computation], computation: Computation, loop: Instruction) -> Number | None:
    """Trip count of a while loop, or None if unknown.

    XLA annotates most loops on CPUs and GPUs with it. Otherwise it follows from the condition `counter < limit`, the
    body's increment of the counter and the initial values.
    """
    if found := _TRIP_COUNT.search(loop.attributes):
        return Number(int(found[1]), chosen_by_data=False)
    condition, body = (computations[loop.called(name)[0]] for name in ("condition", "body"))
    compare = _origin(computations, _Value(condition, condition.instructions[condition.root]))
    after = _origin(computations, _Value(body, body.instructions[body.root]))
    before = _origin(computations, _Value(computation, loop).operand(0))
    is_less_than = compare.instruction.opcode == "compare" and compare.instruction.attribute("direction") == "LT"
    if not is_less_than or after.instruction.opcode != "tuple" or before.instruction.opcode != "tuple":
        return None
    counter = _carried_index(computations, compare.operand(0))
    if counter is None:
        return None
    step = _step(computations, after.operand(counter), counter)
    initial = _number(computations, before.operand(counter))
    limit_index = _carried_index(computations, compare.operand(1))
    if limit_index is None:
        limit = _number(computations, compare.operand(1))
    elif _carried_index(computations, after.operand(limit_index)) == limit_index:  # constant in the loop
        limit = _number(computations, before.operand(limit_index))
    else:
        limit = None
    if limit is None or initial is None or step is None or step < 1:
        return None
    trips = max(-(-(limit.value - initial.value) // step), 0)
    return Number(trips, limit.chosen_by_data or initial.chosen_by_data)


@dataclasses.dataclass(frozen=True)
class _Value:
    """An instruction's result, with the fusion that was entered to reach it, if any."""

    computation: Computation
    instruction: Instruction
    fusion: _Value | None = None

    def operand(self, index: int) -> _Value:
        instruction = self.computation.instructions[self.instruction.operands[index]]
        return dataclasses.replace(self, instruction=instruction)


def _origin(computations: Mapping[str, Computation], value: _Value) -> _Value:
    """Where a value originates: follows copies, tuples and fusions."""
    while True:
        instruction = value.instruction
        if instruction.opcode in ("copy", "bitcast"):
            value = value.operand(0)
        elif instruction.opcode == "fusion":
            inside = computations[instruction.called("calls")[0]]
            value = _Value(inside, inside.instructions[inside.root], fusion=value)
        elif instruction.opcode == "parameter" and value.fusion is not None:
            value = value.fusion.operand(int(instruction.arguments))
        elif instruction.opcode == "get-tuple-element":
            whole = _origin(computations, value.operand(0))
            if whole.instruction.opcode != "tuple":
                return value
            value = whole.operand(int(instruction.attribute("index") or 0))
        else:
            return value


def _carried_index(computations: Mapping[str, Computation], value: _Value) -> int | None:
    """Index of a value among those that a loop carries, in its condition or body; None if it is none of them."""
    origin = _origin(computations, value)
    if origin.instruction.opcode != "get-tuple-element":
        return None
    is_carried = _origin(computations, origin.operand(0)).instruction.opcode == "parameter"
    return int(origin.instruction.attribute("index") or 0) if is_carried else None


def _step(computations: Mapping[str, Computation], value: _Value, counter: int) -> int | None:
    """A loop body's increment of its counter, or None if unknown."""
    added = _origin(computations, value)
    if added.instruction.opcode != "add":
        return None
    indices = [_carried_index(computations, added.operand(side)) for side in (0, 1)]
    if counter not in indices:
        return None
    step = _number(computations, added.operand(1 - indices.index(counter)))
    return None if step is None or step.chosen_by_data else step.value


def _number(computations: Mapping[str, Computation], value: _Value) -> Number | None:
    origin = _origin(computations, value)
    instruction = origin.instruction
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
        return Number(int(instruction.arguments), chosen_by_data=False)
    if instruction.opcode == "select":
        choices = [_number(computations, origin.operand(side)) for side in (1, 2)]
        values = [choice.value for choice in choices if choice is not None]
        return Number(max(values), chosen_by_data=True) if len(values) == 2 else None
    return None
