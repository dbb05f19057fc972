"""`rwkv bench`: tables, JSON, and what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rwkv_jax import save_pretrained
from rwkv_jax.bench.random_model import random_model
from rwkv_jax.config import ModelConfig
from tests.cli.commands import Command

SMALL = ("--random", "2x64", "--vocab-size", 50)


def table(printed: str) -> list[list[str]]:
    """Its rows, below its heading, without spaces within cells."""
    rows = printed.rpartition("\n\n")[2].splitlines()
    return [row.split() for row in rows[1:]]


def test_memory(rwkv: Command) -> None:
    printed = rwkv("bench", "memory", *SMALL, "--contexts", 1000, 100).out
    assert "RWKV-7, 2 x 64, vocabulary 50, " in printed
    assert "state of a text: 33,792 bytes, as in closed form; an engine adds 200 of logits" in printed
    assert [row[:3] for row in table(printed)] == [["100", "0.03", "MB"], ["1,000", "0.03", "MB"]]
    values = json.loads(rwkv("bench", "memory", *SMALL, "--generation", 4, "--json").out)
    assert values["state"] == values["state_expected"] == 2 * 5 * 64 * 4
    assert values["model"].startswith("RWKV-4, 2 x 64")
    assert values["machine"]


def test_memory_of_a_run(rwkv: Command, run_dir: Path) -> None:
    values = json.loads(rwkv("bench", "memory", run_dir, "--contexts", 7, "--json").out)
    assert "random" not in values["model"]
    assert values["caches"] == {"7": 2 * 2 * 32 * 7 * 4}


def test_latency(rwkv: Command) -> None:
    short = ("--contexts", 5, 3, "--tokens", 8, "--repetitions", 2, "--json")
    values = json.loads(rwkv("bench", "latency", *SMALL, *short).out)["seconds_per_token"]
    assert values.keys() == {"3", "5"}
    for timing in values.values():
        assert len(timing["all"]) == 2
        assert timing["median"] == pytest.approx(sum(timing["all"]) / 2)


def test_throughput(rwkv: Command) -> None:
    printed = rwkv("bench", "throughput", *SMALL, "--batch-sizes", 2, 1, "--tokens", 8, "--repetitions", 1).out
    rows = table(printed)
    assert [row[0] for row in rows] == ["1", "2"]
    for size, rate, milliseconds, *_ in rows:
        assert float(rate.replace(",", "")) == pytest.approx(1e3 * int(size) / float(milliseconds), rel=0.1)


def test_a_packed_file_is_named_as_what_it_holds(rwkv: Command, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    config = ModelConfig(vocab_size=256, num_layers=2, width=64)
    save_pretrained(random_model(config, "int8"), path)
    values = json.loads(rwkv("bench", "memory", path, "--tokenizer", "bytes", "--json").out)
    assert values["model"].endswith("M parameters in int8")


def test_help_shows_what_may_be_left_out(
    rwkv: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        rwkv("bench", "memory", "--help")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: rwkv bench memory [-h] [MEMORY OPTIONS] [SOURCE]\n")
    assert "what options" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory"], "bench: name weights or give --random LAYERSxWIDTH, one of the two"),
        (["memory", "weights.pth", "--random", "2x64"], "bench: name weights or give --random"),
        (["memory", "--random", "2,64"], "--random '2,64': must be LAYERSxWIDTH, such as 12x768"),
        (["memory", "--random", "2x65"], "model.width = 65: must be a multiple of"),
        (["memory", "--random", "2x64", "--tokenizer", "world"], "--tokenizer 'world': random weights have one"),
        (
            ["memory", "--random", "2x64", "--quantize", "int8", "--dtype", "bfloat16"],
            "--dtype 'bfloat16': random weights that are packed",
        ),
        (["memory", "nowhere"], "nowhere: no such file or folder"),
        (["latency", "nowhere", "--contexts", "0"], "--contexts 0: must be at least 1"),
        (["latency", "nowhere", "--contexts"], "--contexts : must be at least 1"),
        (["latency", "nowhere", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["throughput", "nowhere", "--batch-sizes", "1", "0"], "--batch-sizes 1 0: must be at least 1"),
        (
            ["latency", "--random", "2x64", "--architecture", "transformer"],
            "bench latency: a Transformer's cache in an",
        ),
        (["throughput", "nowhere", "--repetitions", "0"], "--repetitions 0: must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said(rwkv: Command, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("bench", *arguments)
    assert str(exit_.value.code).startswith(f"rwkv: {message}")
