"""What the Pallas kernels take on an H100 and on TPUs, compiled where there is neither; makes docs/kernels.md's tables.

    make .venv-devices/installed
    .venv-devices/bin/python benchmarks/kernel_resources.py            # prints the tables
    .venv-devices/bin/python benchmarks/kernel_resources.py --write    # and puts them into the page

Takes some five minutes on two cores. Nothing is run, and nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import deviceless
from deviceless import DTYPES, GENERATIONS, SHAPE, TPU, TPU_SHAPE, TpuResources, TritonResources
from rwkv_kernels.dispatch import Implementation, anything
from rwkv_kernels.ops.wkv7.output_pallas_triton import NUM_WARPS, wkv7_output_pallas_triton
from rwkv_kernels.ops.wkv7.step_pallas_triton import num_warps, wkv7_step_pallas_triton
from rwkv_kernels.precision import Precision
from rwkv_kernels.testing.cases import Shape

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
START, END = "<!-- tables: start -->", "<!-- tables: end -->"
COMBINATIONS: tuple[tuple[str, Precision], ...] = (
    ("bfloat16", "full"),
    ("bfloat16", "default"),
    ("bfloat16", "fast"),
    ("float32", "full"),
)
"""Dtypes of the inputs and precisions of the products."""
TRITON_COLUMNS = (
    "operator",
    "kernel",
    "inputs",
    "precision",
    "shipped",
    "registers",
    "spill stores",
    "spill loads",
    "shared memory",
    "wgmma",
    "mma.sync",
    "bytes",
)
PART_COLUMNS = (
    "function",
    "kernel",
    "inputs",
    "head size",
    "warps",
    "registers",
    "spill stores",
    "spill loads",
    "shared memory",
    "bytes",
)
DECODE_COLUMNS = ("rows", "step_implementation", "kernels", "MB")
TRAIN_COLUMNS = ("output_implementation", "kernels", "MB")
TPU_COLUMNS = ("operator", "shipped", "precision", *GENERATIONS)

HEAD_SIZES = (32, 64, 128)
LARGE_HEADS = SHAPE._replace(key_dim=128, value_dim=128)
STEP, OUTPUT = (Implementation(run, anything) for run in (wkv7_step_pallas_triton, wkv7_output_pallas_triton))
"""Kernels that are not asked what machine they are on."""

Key = tuple[str, str, str, str]
"""Operator, kernel, dtype of the inputs and precision: what tells the Triton table's rows apart."""


def has_products(operator: str) -> bool:
    """Whether there are matrix products, and so a choice of their precision."""
    return "precision" in inspect.signature(deviceless.implementation(operator, "pallas_triton")).parameters


def combinations(operator: str) -> Iterator[tuple[str, Precision]]:
    """Rows of an operator: without products, precisions are all the same."""
    return (pair for pair in COMBINATIONS if pair[1] == "full" or has_products(operator))


def key(operator: str, found: TritonResources, dtype: str, precision: Precision) -> Key:
    return operator, found.kernel, dtype, precision if has_products(operator) else "-"


def _line(cells: tuple[object, ...]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(columns: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> Iterator[str]:
    yield _line(columns)
    yield "|---" * len(columns) + "|"
    yield from map(_line, rows)


def _triton_rows() -> Iterator[tuple[object, ...]]:
    for operator in (*deviceless.TRITON, deviceless.TILES):
        for dtype, precision in combinations(operator):
            kernels = deviceless.compile_triton(operator, "forward", dtype, precision)
            kernels += deviceless.compile_triton(operator, "gradient", dtype, precision)
            for found in {x.kernel: x for x in kernels}.values():  # some serve both
                yield *key(operator, found, dtype, precision), *_resources(operator, found, SHAPE)


def _large_rows() -> Iterator[tuple[object, ...]]:
    for operator in (operator for operator in deviceless.TRITON if operator.endswith("split")):
        for dtype, precision in combinations(operator):
            for found in deviceless.compile_triton(operator, "gradient", dtype, precision, shape=LARGE_HEADS):
                yield *key(operator, found, dtype, precision), *_resources(operator, found, LARGE_HEADS)


def _resources(operator: str, found: TritonResources, shape: Shape) -> tuple[object, ...]:
    return (
        deviceless.settings(operator, "pallas_triton", found.kernel, shape.key_dim),
        found.registers,
        found.spill_stores,
        found.spill_loads,
        found.shared_memory,
        found.wgmma,
        found.mma_sync,
        found.bytes,
    )


def _part_rows() -> Iterator[tuple[object, ...]]:
    for dtype, size in itertools.product(("bfloat16", "float32"), HEAD_SIZES):
        found = deviceless.compile_step(dtype, size)
        yield "wkv7_step", "step", dtype, size, num_warps(size), *_numbers(found)
    for dtype, size in itertools.product(("bfloat16", "float32"), HEAD_SIZES):
        for found in deviceless.compile_output(dtype, size):
            yield "wkv7_output", found.kernel, dtype, size, NUM_WARPS, *_numbers(found)


def _numbers(found: TritonResources) -> tuple[int, ...]:
    return found.registers, found.spill_stores, found.spill_loads, found.shared_memory, found.bytes


def _decode_rows() -> Iterator[tuple[object, ...]]:
    import layer_programs  # here: tests of kernels need no models

    for batch in (1, 64):
        for name, implementation in (("None", None), ("pallas_triton", STEP)):
            kernels, traffic = layer_programs.decoding_a_token(batch, implementation)
            yield batch, name, f"{kernels:g}", f"{traffic / 1e6:.0f}"


def _train_rows() -> Iterator[tuple[object, ...]]:
    import layer_programs  # as above

    for name, implementation in (("None", None), ("pallas_triton", OUTPUT)):
        kernels, traffic = layer_programs.training_time_mixing(implementation)
        yield name, f"{kernels:g}", f"{traffic / 1e6:.0f}"


@functools.cache
def _tpu_kernels(generation: str, operator: str, dtype: str, precision: Precision) -> list[TpuResources]:
    """The forward kernel, the one that stores states, and the backward one."""
    found = deviceless.compile_tpu(generation, operator, "forward", dtype, precision)
    found += deviceless.compile_tpu(generation, operator, "gradient", dtype, precision)
    return sorted(found, key=lambda x: deviceless.KERNELS.index(x.kernel))


def _tpu_rows(operators: Iterable[str], number: Callable[[str, TpuResources], int]) -> Iterator[tuple[object, ...]]:
    """A cell has a number of each kernel."""

    def cell(generation: str, operator: str, dtype: str, precision: Precision) -> str:
        found = _tpu_kernels(generation, operator, dtype, precision)
        return " / ".join(str(number(operator, x)) for x in found)

    for operator in operators:
        for dtype, precision in combinations(operator):
            if dtype == "bfloat16":
                cells = (cell(generation, operator, dtype, precision) for generation in GENERATIONS)
                shipped = deviceless.settings(operator, "pallas_mosaic_tpu")
                yield operator, shipped, precision if has_products(operator) else "-", *cells


def _kib(operator: str, found: TpuResources) -> int:
    del operator
    return found.vmem // 1024


def _bundles_per_head(operator: str, found: TpuResources) -> int:
    run = deviceless.implementation(operator, "pallas_mosaic_tpu")
    return found.bundles // inspect.signature(run).parameters["kernel"].default.heads


def _sizes(shape: tuple[int, ...]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in zip("BTHNM", shape, strict=True))


def report() -> Iterator[str]:
    """Lines of the page's second half."""
    version = importlib.metadata.version
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu")
    )
    yield f"\nCompiled on {platform.machine()}, Python {platform.python_version()}, {packages}; no accelerator."
    yield f"\n{_heading(SHAPE)}\n"
    yield from _table(TRITON_COLUMNS, _triton_rows())
    yield f"\n{_heading(LARGE_HEADS)}, with gradients\n"
    yield from _table(TRITON_COLUMNS, _large_rows())
    yield "\n### wkv7_step (bytes a row and head) and wkv7_output (a token and head) on an H100\n"
    yield from _table(PART_COLUMNS, _part_rows())
    yield "\n### A token in a layer of RWKV-7, width 2048, bfloat16, on an H100\n"
    yield from _table(DECODE_COLUMNS, _decode_rows())
    yield "\n### Time mixing in a layer of RWKV-7, B8 T4096, width 768, bfloat16, forward and backward, on an H100\n"
    yield from _table(TRAIN_COLUMNS, _train_rows())
    yield f"\n### TPUs, {_sizes(TPU_SHAPE)}: KiB of VMEM, bfloat16 inputs; forward / forward, storing / backward\n"
    yield from _table(TPU_COLUMNS, _tpu_rows(TPU, _kib))
    yield "\n### TPUs, the same: bundles a chunk and head\n"
    yield from _table(TPU_COLUMNS, _tpu_rows(filter(has_products, TPU), _bundles_per_head))


def _heading(shape: Shape) -> str:
    """Of a table of kernels on an H100."""
    return f"### H100 (sm_90a), {_sizes(shape)}"


def read_spills(text: str, shape: Shape = SHAPE) -> dict[Key, int]:
    """Spill stores of every row of a written table for an H100."""
    spills: dict[Key, int] = {}
    for line in text.split(_heading(shape))[1].split("\n### ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(TRITON_COLUMNS) and cells[2] in DTYPES:
            spills[cells[0], cells[1], cells[2], cells[3]] = int(cells[TRITON_COLUMNS.index("spill stores")])
    return spills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them into docs/kernels.md")
    arguments = parser.parse_args()
    deviceless.prepare()
    lines: list[str] = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        DOCUMENT.write_text("\n".join([before + START, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
