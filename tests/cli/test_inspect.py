"""`rwkv inspect`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Command


def test_prints_a_line_a_layer_and_writes_all_numbers_and_pictures(
    rwkv: Command, run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "seen"
    trace = ("--trace", "def f1(x):", "--subject", "f1", "--answer", "return", "--samples", 1)
    printed = rwkv("inspect", run_dir, "--text", "def f7(x):", "--map-tokens", 4, *trace, "--out", out)
    lines = printed.out.splitlines()
    assert lines[0].startswith("RWKV-7, ")
    assert [line.split()[0] for line in lines[1:4]] == ["layer", "0", "1"]
    assert "with the subject corrupted" in lines[4]
    assert lines[5:] == [f"{out}: inspection.json and pictures"]
    names = {"inspection.json", "half_lives.png", "states.png", "attention.png", "trace.png"}
    assert {path.name for path in out.iterdir()} == names
    numbers = json.loads((out / "inspection.json").read_text())
    assert numbers["model"]["generation"] == "7"
    assert "".join(numbers["pieces"]) == "def f7(x):"
    assert len(numbers["half_lives"]["tokens"][1]) == 2
    assert len(numbers["half_lives"]["tokens"][1][0]) == 32
    assert len(numbers["shares"][0]) == 4
    assert numbers["recall"] is None
    subject = numbers["trace"]["pieces"]
    assert "".join(subject) == "def f1(x):"
    assert len(numbers["trace"]["restored"]) == 2
    assert len(numbers["trace"]["restored"][0]) == len(subject)


@pytest.mark.long
def test_says_how_far_back_probes_find_tokens(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    printed = rwkv("inspect", run_dir, "--text", "def f7(x):", "--recall", "--out", tmp_path / "seen")
    assert "a probe of the last layer's state finds the token at distance 0: " in printed.out
    recall = json.loads((tmp_path / "seen" / "inspection.json").read_text())["recall"]
    assert recall["num_test"] == 128
    assert f"0: {recall['accuracy'][0]:.0%}" in printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens", 0), "--tokens 0: must be at least 1"),
        (("--map-tokens", 0), "--map-tokens 0: must be at least 1"),
        (("--seed", -1), "--seed -1: must fit in 32 bits"),
        (("--text", ""), "--text '': is empty; give some text"),
        (("--text", "a", "--text-file", "b"), "--text: is given, and --text-file too"),
        (("--text-file", "/nowhere"), "--text-file '/nowhere': cannot be read"),
        (("--subject", "f1"), "--subject 'f1': belongs to --trace"),
        (("--trace", "def f1"), "subject = None: a trace needs one"),
        (("--trace", "def f1", "--subject", "f2"), "--subject 'f2': must be a part of the prompt 'def f1'"),
        (("--trace", "def f1", "--subject", "f1", "--answer", ""), "--answer '': must have a text"),
        (("--trace", "def f1", "--subject", "f1", "--noise", -1), "--noise -1.0: must not be negative"),
        (("--out", "/"), "--out '/': "),
    ],
)
def test_refuses_before_it_loads_anything(rwkv: Command, flags: tuple[object, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        rwkv("inspect", "/no/such/model", *flags)
