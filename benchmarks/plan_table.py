"""Plans every recipe of configs/ for H100s and TPU v5p, and one with other settings; makes docs/plan.md's tables.

    make .venv-devices/installed
    .venv-devices/bin/python benchmarks/plan_table.py plans            # compiles what the folder does not have yet
    .venv-devices/bin/python benchmarks/plan_table.py plans --write    # and puts the tables into the page
    .venv-devices/bin/python benchmarks/plan_table.py plans --steps --write    # the table of one step, likewise
    .venv-devices/bin/python benchmarks/plan_table.py plans --anew --only rwkv6_3b --devices h100    # compiles it again

Takes one to ten minutes a plan on two cores, each in a process of its own. Nothing is run on any device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_jax.recipes import RELEASED_MODELS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"
START, END = "<!-- table: start -->", "<!-- table: end -->"
STEPS_START, STEPS_END = "<!-- steps: start -->", "<!-- steps: end -->"

SLICES = {
    "rwkv7_0_1b": ("h100:1x8", "v5p:2x2x2"),
    "rwkv7_0_4b": ("h100:1x8", "v5p:2x2x2"),
    "rwkv7_1_5b": ("h100:2x8", "v5p:2x2x4"),
    "rwkv7_2_9b": ("h100:4x8", "v5p:2x4x4"),
    "rwkv7_7_2b": ("h100:8x8", "v5p:4x4x4"),
    "rwkv6_1_6b": ("h100:2x8", "v5p:2x2x4"),
    "rwkv6_3b": ("h100:4x8", "v5p:2x4x4"),
    "rwkv6_7b": ("h100:8x8", "v5p:4x4x4"),
    "rwkv4_169m": ("h100:1x8", "v5p:2x2x2"),
    "rwkv4_430m": ("h100:1x8", "v5p:2x2x2"),
    "rwkv4_1_5b": ("h100:2x8", "v5p:2x2x4"),
    "rwkv4_3b": ("h100:4x8", "v5p:2x4x4"),
    "rwkv4_7b": ("h100:8x8", "v5p:4x4x4"),
    "rwkv4_14b": ("h100:8x8", "v5p:4x4x4"),
}
"""Recipes and what each is planned for."""

STEPS: dict[str, tuple[str, ...]] = {
    "before": ("--training.remat", "full", "--training.no-fused-loss"),
    "now": (),
    "now, kernels named": ("--model.wkv-implementation", "pallas_triton"),
    "now, split kernels named": ("--model.wkv-implementation", "pallas_triton_split"),
    "and those after the operator": (
        *("--model.wkv-implementation", "pallas_triton_split"),
        *("--model.output-implementation", "pallas_triton"),
    ),
}
"""Settings with which a step of STEPS_OF is planned, as flags."""
STEPS_OF = ("rwkv7_0_1b", "h100:1x8")
STEP_COLUMNS = ("recipe", "operator", "peak", "products ms", "traffic ms", "launches", "step ms")

KERNELS = ("pallas_triton", "pallas_triton_split")
"""By whose formulas a step is predicted, besides the compiled one."""

COLUMNS = (
    "config",
    "devices",
    "mesh",
    "remat",
    "tokens a step",
    "arguments",
    "temporary",
    "peak",
    "fits",
    "products ms",
    "interconnect ms",
    "best tokens/s",
    "best MFU",
    "step ms",
    *(f"by {kernels}" for kernels in KERNELS),
)


WEAK_DECAYS = "\u00b9"
"""Marks what holds for one of the two loops of the chunked operators of RWKV-5 and 6."""


def path_of(config: str, topology: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    others = "".join(f"-{flag.strip('-').replace('.', '-')}" for flag in flags)
    return folder / f"{config}-{topology.replace(':', '-')}{others}.json"


def plan(config: str, topology: str, folder: Path, anew: bool = False, flags: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's plan: from the folder, or else compiled by `rwkv plan`, which leaves it there."""
    path = path_of(config, topology, folder, flags)
    if anew:
        path.unlink(missing_ok=True)
    if not path.exists():
        program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
        arguments = ("plan", f"configs/{config}.py", "--topology", topology, "--json", str(path.resolve()), *flags)
        subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def row(config: str, found: dict[str, Any]) -> tuple[object, ...]:
    """A plan's line of the table."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
    tokens, arguments = f"{found['work']['tokens']:,}", gibibytes(found["arguments"]["total"])
    start = config, found["topology"], mesh, RELEASED_MODELS[config].remat, tokens, arguments
    program = found["program"]
    if program is None:
        return (*start, *["-"] * 2, "no", *["-"] * (5 + len(KERNELS)))
    compiled, *others = program["estimates"]
    by_kernels = {estimate["implementation"]: milliseconds(estimate["seconds"]) for estimate in others}
    share = found["peak"] / found["device"]["memory"]
    mark = WEAK_DECAYS if program.get("chosen_loops") else ""
    return (
        *start,
        gibibytes(program["temporary"]),
        f"{gibibytes(found['peak'])} ({share:.0%})",
        "yes" if found["fits"] else "no",
        f"{milliseconds(program['floors']['products'])}{mark}",
        milliseconds(program["floors"]["interconnect"]),
        f"{found['tokens_per_second']:,.0f}{mark}",
        f"{found['mfu']:.0%}",
        f"{milliseconds(compiled['seconds'])}{mark}",
        *(by_kernels.get(kernels, "-") for kernels in KERNELS),
    )


def step_rows(label: str, found: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """A plan's lines of the table of steps."""
    for estimate in found["program"]["estimates"]:
        how = "compiled" if estimate["is_compiled"] else "by formulas"
        sums = (milliseconds(estimate[name]) for name in ("products", "traffic"))
        end = (f"{estimate['launches']:,}", milliseconds(estimate["seconds"]))
        peak = gibibytes(found["peak"]) if estimate["is_compiled"] else "-"
        yield label, f"{estimate['implementation']}, {how}", peak, *sums, *end


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def gibibytes(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def table(columns: Sequence[str], rows: Sequence[tuple[object, ...]]) -> Iterator[str]:
    """Lines of a table in Markdown, and an empty one."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for cells in rows:
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def compiled_with() -> str:
    """The line above a table that says what compiled it."""
    version = importlib.metadata.version
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jax-cuda13-plugin", "libtpu"))
    return f"\nCompiled with {packages}; no accelerator.\n"


def report(rows: Sequence[tuple[object, ...]]) -> Iterator[str]:
    """Lines of the page's table."""
    yield compiled_with()
    yield from table(COLUMNS, rows)
    if any(str(cell).endswith(WEAK_DECAYS) for cells in rows for cell in cells):
        yield f"{WEAK_DECAYS} While no decay is strong: the data choose one of two loops, and the faster is counted.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the plans' JSON")
    parser.add_argument("--only", nargs="*", default=(), help="recipes to plan, such as rwkv7_7_2b; all by default")
    parser.add_argument("--devices", help="plan for these alone, such as h100; for all by default")
    parser.add_argument("--anew", action="store_true", help="compile what the folder has already, too")
    parser.add_argument("--no-compile", action="store_true", help="leave out what the folder does not have yet")
    parser.add_argument("--steps", action="store_true", help="plan what the table of steps compares, not the recipes")
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.devices):
        parser.error("--write replaces the whole table; leave out --only and --devices")
    if arguments.anew and arguments.no_compile:
        parser.error("--anew compiles; leave out --no-compile")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.steps:
        plans = {name: plan(*STEPS_OF, arguments.folder, arguments.anew, flags) for name, flags in STEPS.items()}
        rows = [cells for name, found in plans.items() for cells in step_rows(name, found)]
        lines = [compiled_with(), *table(STEP_COLUMNS, rows)]
    else:
        wanted = [(config, topology) for config in arguments.only or SLICES for topology in SLICES[config]]
        if arguments.devices:
            wanted = [pair for pair in wanted if pair[1].startswith(f"{arguments.devices}:")]
        if arguments.no_compile:
            wanted = [pair for pair in wanted if path_of(*pair, arguments.folder).exists()]
        rows = [row(config, plan(config, topology, arguments.folder, arguments.anew)) for config, topology in wanted]
        lines = list(report(rows))
    print("\n".join(lines))
    if arguments.write:
        start, end = (STEPS_START, STEPS_END) if arguments.steps else (START, END)
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(start)
        after = rest.split(end)[1]
        DOCUMENT.write_text("\n".join([before + start, *lines, end + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
