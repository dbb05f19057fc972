"""docs/plan.md's table, the docstrings of configs/ that say the same of the same plans, and the script behind it."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.plan.devices import parse_topology

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "plan_table.py"))
RECIPES = sorted(SCRIPT["SLICES"])
MARK = SCRIPT["WEAK_DECAYS"]
CLAIM = re.compile(
    r"(?P<devices>[\w-]+:[\dx]+), (?P<mesh>[\w ]+?): (?P<fits>fits|does not fit); "
    r"arguments (?P<arguments>[\d.]+ GiB), peak (?P<peak>[\d.]+ GiB) of (?P<memory>[\d.]+ GiB) a device; "
    r"at best (?P<rate>[\d,]+) tokens/s, MFU (?P<mfu>\d+%)(?P<alone> \(of arithmetic alone\))?"
    r"(?P<weak> while decays are weak)?(; predicted (?P<step>\d+) ms a step"
    r"(, (?P<triton>\d+) by pallas_triton)?(, (?P<split>\d+) by pallas_triton_split)?)?[.;]"
)
"""What a docstring says of a plan, on one line."""


def rows_of_table() -> list[dict[str, str]]:
    """The rows of the committed table, by the names of its columns."""
    table = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").split(SCRIPT["START"])[1].split(SCRIPT["END"])[0]
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert tuple(lines[0]) == SCRIPT["COLUMNS"]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def claims_of(name: str) -> dict[str, dict[str, str | None]]:
    """What a recipe's docstring says of each plan, by topology."""
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return {found["devices"]: found.groupdict() for found in CLAIM.finditer(" ".join(docstring.split()))}


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_and_table_say_the_same_of_the_same_plans(name: str) -> None:
    rows = {row["devices"]: row for row in rows_of_table() if row["config"] == name}
    claims = claims_of(name)
    assert rows
    assert claims.keys() == rows.keys()
    for topology, row in rows.items():
        claim, device = claims[topology], parse_topology(topology).device
        peak, share = re.fullmatch(r"([\d.]+ GiB) \((\d+)%\)", row["peak"]).groups()  # pyright: ignore
        assert claim["mesh"] == row["mesh"]
        assert (claim["fits"] == "fits") == (row["fits"] == "yes")
        assert (claim["arguments"], claim["peak"]) == (row["arguments"], peak)
        assert claim["memory"] == SCRIPT["gibibytes"](device.memory)
        assert float(peak.split()[0]) * 2**30 / device.memory == pytest.approx(int(share) / 100, abs=0.006)
        assert (claim["rate"], claim["mfu"]) == (row["best tokens/s"].removesuffix(MARK), row["best MFU"])
        assert (claim["alone"] is not None) == (claim["mfu"] == "100%")
        steps = (row[column].removesuffix(MARK) for column in ("step ms", "by pallas_triton", "by pallas_triton_split"))
        assert [claim[name] or "-" for name in ("step", "triton", "split")] == list(steps)


def test_every_recipe_has_a_row_and_no_row_is_there_twice() -> None:
    pairs = [(row["config"], row["devices"]) for row in rows_of_table()]
    assert len(set(pairs)) == len(pairs)
    for config, topology in pairs:
        assert topology in SCRIPT["SLICES"][config]
    assert {config for config, _ in pairs} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_what_holds_for_weak_decays_is_marked(name: str) -> None:
    for claim in claims_of(name).values():
        assert (claim["weak"] is not None) == name.startswith("rwkv6")
    for row in rows_of_table():
        if row["config"] == name:
            assert row["best tokens/s"].endswith(MARK) == name.startswith("rwkv6")
            assert row["products ms"].endswith(MARK) == name.startswith("rwkv6")


def plan_in_json(**program: Any) -> dict[str, Any]:
    return {
        "topology": "h100:1x8",
        "mesh": {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1},
        "device": {"memory": 80 << 30},
        "work": {"tokens": 4096},
        "arguments": {"total": 1 << 30},
        "program": {
            "temporary": 2 << 30,
            "floors": {"products": 0.25, "interconnect": 0.5},
            "estimates": [
                {"implementation": "chunked", "seconds": 0.75},
                {"implementation": "pallas_triton", "seconds": 0.5},
            ],
        }
        | program,
        "peak": 4 << 30,
        "fits": True,
        "tokens_per_second": 8192.0,
        "mfu": 0.5,
    }


def test_rows_and_their_note() -> None:
    plain = SCRIPT["row"]("rwkv7_0_1b", plan_in_json(chosen_loops=[]))
    cells = ["rwkv7_0_1b", "h100:1x8", "data 2 x fsdp 4", "operator", "4,096", "1.00 GiB"]
    cells += ["2.00 GiB", "4.00 GiB (5%)", "yes", "250", "500", "8,192", "50%"]
    assert list(plain) == [*cells, "750", "500", "-"]
    marked = SCRIPT["row"]("rwkv6_3b", plan_in_json(chosen_loops=["while.1"]))
    assert list(marked[9:]) == [f"250{MARK}", "500", f"8,192{MARK}", "50%", f"750{MARK}", "500", "-"]
    refused = SCRIPT["row"]("rwkv7_0_1b", plan_in_json() | {"program": None})
    assert list(refused[6:]) == ["-", "-", "no", *"-------"]
    assert len(plain) == len(marked) == len(refused) == len(SCRIPT["COLUMNS"])
