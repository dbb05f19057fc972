"""Plans as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rwkv_jax.plan.devices import PREALLOCATED
from rwkv_jax.plan.planner import USABLE_SHARE, Plan, Program
from rwkv_jax.tables import format_table

VERSION = 3
"""Of the JSON format; changes when a field is renamed or changes its meaning."""

CHOSEN_BY_DATA = "the data choose one of two loops; counted as for weak decays"
"""For the chunked operators of RWKV-5 and 6, which alone have such loops; official initial values have weak decays."""


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data; docs/plan.md describes the fields."""
    values = dataclasses.asdict(plan) | {"version": VERSION, "peak": plan.peak, "fits": plan.fits}
    values["arguments"]["total"] = plan.arguments.total
    return values | {"tokens_per_second": plan.tokens_per_second, "mfu": plan.mfu}


def describe(plan: Plan) -> str:
    """The plan as text."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    shape = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    yield f"{plan.topology}: {shape}; a step has {plan.work.tokens:,} tokens"
    if plan.idle_devices:
        yield f"{plan.idle_devices} devices stay idle: they cannot share a step's rows evenly with the others"
    yield "\nbytes of one device"
    for name, size in plan.arguments.groups.items():
        yield _row(name, _bytes(size))
    yield _row("arguments", _bytes(plan.arguments.total), f"{plan.arguments.total:,} bytes by shapes and shardings")
    if plan.arguments.compiled is not None:
        difference = plan.arguments.compiled - plan.arguments.total - plan.arguments.padding
        says = "the compiler says the same" if difference == 0 else f"the compiler says {difference:+,} bytes"
        yield _row("padding of layouts", _bytes(plan.arguments.padding), says)
    if plan.arguments.on_host:
        yield _row("of these on the host", _bytes(plan.arguments.on_host))
    if plan.program is None or plan.peak is None:
        yield f"\nthe compiler refuses: {plan.refusal}"
        yield "verdict: does not fit"
        return
    program = plan.program
    for name in ("results", "temporary", "code"):
        yield _row(name, _bytes(getattr(program, name)))
    yield _row("peak", _bytes(plan.peak), f"{plan.peak / plan.device.memory:.0%} of {_bytes(plan.device.memory)}")
    yield from _work_lines(plan, program)
    yield from _floor_lines(plan, program)


def _work_lines(plan: Plan, program: Program) -> Iterator[str]:
    devices = math.prod(plan.mesh.values())
    operator = plan.work.operator
    if operator is not None and operator.may_be_measured and plan.device.platform != "cpu":
        yield f"\n{operator.operator} by {operator.implementation}, by the table; a new run measures, and may take"
        yield "another: name the one to plan, --model.wkv-implementation NAME"
    yield "\nwork of one device"
    yield _row("model FLOPs", f"{plan.work.model_flops / devices:.3e}", "forward and backward, by hand")
    if plan.work.recomputed_flops:
        yield _row("recomputed", f"{plan.work.recomputed_flops / devices:.3e}", "by hand, at most")
    for precision, flops in program.product_flops.items():
        yield _row(f"products, {precision}", f"{flops:.3e}", "as compiled, loops times their trip counts")
    yield _row("memory traffic", _bytes(program.traffic), "as compiled, if nothing stays in a cache")
    if program.unknown_loops:
        yield f"  counted once, trip count unknown: {', '.join(program.unknown_loops)}"
    if program.uncounted_kernels:
        yield f"  products of these kernels are not known, and left out: {', '.join(program.uncounted_kernels)}"
    if program.chosen_loops:
        yield f"  {CHOSEN_BY_DATA}: {', '.join(program.chosen_loops)}"
    rows = [("collectives", "along", "devices", "count", "bytes", "sent", "ms")]
    for total in program.collectives:
        along = " x ".join(total.axes) + (", hosts" if total.across_hosts else "")
        sizes = _bytes(total.bytes), _bytes(total.sent_bytes), f"{1e3 * total.seconds:.2f}"
        rows.append((total.kind, along, str(total.group_size), str(total.count), *sizes))
    if program.collectives:
        yield "\n" + format_table(rows, "<<>>>>>")


def _floor_lines(plan: Plan, program: Program) -> Iterator[str]:
    highest, seconds = program.floors.largest
    yield "\nfloors of a step, ms"
    for name, floor in dataclasses.asdict(program.floors).items():
        notes = ["<- the highest"] if name == highest else []
        if name == "interconnect" and program.collectives:
            notes.append("by ring algorithms, an estimate")
        yield _row(name, f"{1e3 * floor:.2f}", ", ".join(notes))
    yield _row(
        "(memory traffic)", f"{1e3 * program.traffic / plan.device.memory_bandwidth:.2f}", "an estimate, no floor"
    )
    yield from _estimate_lines(plan, program)
    rate, mfu = plan.work.tokens / seconds, program.floors.arithmetic / seconds
    best = f"at best {rate:,.0f} tokens/s, MFU {mfu:.0%}"
    best += " (of arithmetic alone)" if highest == "arithmetic" else ""
    best += " while decays are weak" if program.chosen_loops else ""
    yield f"\nverdict: {'fits' if plan.fits else 'does not fit'}; {best}"
    if program.unknown_loops:
        yield "the rate is too high: it leaves out all but one turn of the loops named above"
    if program.uncounted_kernels:
        yield "the rate may be too high, and the predicted step too short: products of the kernels above are left out"
    if plan.peak is not None and plan.usable_memory < plan.peak <= plan.device.memory:
        yield f"the driver and NCCL leave about {USABLE_SHARE[plan.device.platform]:.0%} of a GPU's memory"
    if plan.fits and plan.device.platform == "cuda" and (plan.peak or 0) > PREALLOCATED * plan.device.memory:
        yield f"JAX takes {PREALLOCATED:.0%} of a GPU's memory by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


def _estimate_lines(plan: Plan, program: Program) -> Iterator[str]:
    """The predicted step, with the compiled implementation of the WKV operator and with its kernels."""
    if not program.estimates:
        return
    launch = plan.device.launch
    rows = [("predicted step, ms", "", "products", "traffic", "launches", "in all")]
    for found in program.estimates:
        how = "as compiled" if found.is_compiled else "by formulas"
        launches = f"{found.launches:,}" if launch else "-"
        products, traffic, total = (f"{1e3 * x:.0f}" for x in (found.products, found.traffic, found.seconds))
        rows.append((found.implementation or "step", how, products, traffic, launches, total))
    yield "\n" + format_table(rows, "<<>>>>", indent="")
    shortest = f"a launch of {1e6 * launch:.1f} us, " if launch else ""
    yield f"  each instruction at the longest of {shortest}its traffic and its products, and all collectives besides;"
    yield "  nothing of it was measured, and a kernel may take several times as long: see docs/plan.md"


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<26}{value:>14}  {note}".rstrip()


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"
