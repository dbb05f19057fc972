"""Plans every recipe of configs/ for H100s and TPU v5p; makes docs/plan.md's table.

    make .venv-devices/installed
    .venv-devices/bin/python benchmarks/plan_table.py plans            # compiles what the folder does not have yet
    .venv-devices/bin/python benchmarks/plan_table.py plans --write    # and puts the table into the page
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

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"
START, END = "<!-- table: start -->", "<!-- table: end -->"

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

COLUMNS = (
    "config",
    "devices",
    "mesh",
    "tokens a step",
    "arguments",
    "temporary",
    "peak",
    "fits",
    "products ms",
    "interconnect ms",
    "best tokens/s",
    "best MFU",
)


WEAK_DECAYS = "\u00b9"
"""Marks what holds for one of the two loops of the chunked operators of RWKV-5 and 6."""


def path_of(config: str, topology: str, folder: Path) -> Path:
    return folder / f"{config}-{topology.replace(':', '-')}.json"


def plan(config: str, topology: str, folder: Path, anew: bool = False) -> dict[str, Any]:
    """A recipe's plan: from the folder, or else compiled by `rwkv plan`, which leaves it there."""
    path = path_of(config, topology, folder)
    if anew:
        path.unlink(missing_ok=True)
    if not path.exists():
        program = "import sys; from rwkv_jax.cli import main; sys.argv[0] = 'rwkv'; main()"
        arguments = ("plan", f"configs/{config}.py", "--topology", topology, "--json", str(path.resolve()))
        subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def row(config: str, found: dict[str, Any]) -> tuple[object, ...]:
    """A plan's line of the table."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
    start = config, found["topology"], mesh, f"{found['work']['tokens']:,}", gibibytes(found["arguments"]["total"])
    program = found["program"]
    if program is None:
        return (*start, "-", "-", "no", "-", "-", "-", "-")
    share = found["peak"] / found["device"]["memory"]
    mark = WEAK_DECAYS if program.get("chosen_loops") else ""
    return (
        *start,
        gibibytes(program["temporary"]),
        f"{gibibytes(found['peak'])} ({share:.0%})",
        "yes" if found["fits"] else "no",
        f"{1e3 * program['floors']['products']:.0f}{mark}",
        f"{1e3 * program['floors']['interconnect']:.0f}",
        f"{found['tokens_per_second']:,.0f}{mark}",
        f"{found['mfu']:.0%}",
    )


def gibibytes(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def report(rows: Sequence[tuple[object, ...]]) -> Iterator[str]:
    """Lines of the page's table."""
    version = importlib.metadata.version
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jax-cuda13-plugin", "libtpu"))
    yield f"\nCompiled with {packages}; no accelerator.\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for cells in rows:
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    if any(str(cell).endswith(WEAK_DECAYS) for cells in rows for cell in cells):
        yield f"{WEAK_DECAYS} While no decay is strong: the data choose one of two loops, and the faster is counted.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the plans' JSON")
    parser.add_argument("--only", nargs="*", default=(), help="recipes to plan, such as rwkv7_7_2b; all by default")
    parser.add_argument("--devices", help="plan for these alone, such as h100; for all by default")
    parser.add_argument("--anew", action="store_true", help="compile what the folder has already, too")
    parser.add_argument("--no-compile", action="store_true", help="leave out what the folder does not have yet")
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.devices):
        parser.error("--write replaces the whole table; leave out --only and --devices")
    if arguments.anew and arguments.no_compile:
        parser.error("--anew compiles; leave out --no-compile")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [(config, topology) for config in arguments.only or SLICES for topology in SLICES[config]]
    if arguments.devices:
        wanted = [pair for pair in wanted if pair[1].startswith(f"{arguments.devices}:")]
    if arguments.no_compile:
        wanted = [pair for pair in wanted if path_of(*pair, arguments.folder).exists()]
    rows = [row(config, plan(config, topology, arguments.folder, arguments.anew)) for config, topology in wanted]
    lines = list(report(rows))
    print("\n".join(lines))
    if arguments.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        DOCUMENT.write_text("\n".join([before + START, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
