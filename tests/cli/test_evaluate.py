"""`rwkv evaluate`: what it prints and writes, and what it refuses before it loads anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rwkv_jax import ModelConfig, save_pretrained
from rwkv_jax.bench.random_model import random_model
from tests.cli.commands import Command
from tests.evaluation.piqa_file import write_piqa


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    return write_piqa(tmp_path / "valid.jsonl")


def test_a_run_is_evaluated_and_again_from_what_is_written(
    rwkv: Command, run_dir: Path, piqa: Path, tmp_path: Path
) -> None:
    command = ("evaluate", run_dir, "--tasks", f"piqa={piqa}", "--limit", 3, "--num-fewshot", 1, "--tune", "never")
    printed = rwkv(*command, "--output", tmp_path / "out")
    assert printed.out == (tmp_path / "out" / "results.md").read_text()
    assert "| piqa | 1 | 1 | 3 | acc | " in printed.out
    assert "piqa: 0 of 3 items\n" in printed.err
    assert printed.err.endswith(f"piqa: 3 of 3 items\nwritten to {tmp_path / 'out'}\n")
    again = rwkv(*command, "--output", tmp_path / "out", "--json")
    content = json.loads(again.out)
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["tasks"][0]["num_resumed"] == 3
    assert content["model"]["name"] == run_dir.name
    with pytest.raises(SystemExit, match="is of another evaluation: begin was True and is False; name another folder"):
        rwkv(*command, "--output", tmp_path / "out", "--no-begin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "piqua=x"), "rwkv: --tasks 'piqua': no such task; did you mean piqa"),
        (
            ("--tasks", "piqa=nowhere.jsonl"),
            "rwkv: --tasks: piqa = 'nowhere.jsonl': no such file or folder; give a file",
        ),
        (("--tasks", "piqa"), "rwkv: --tasks 'piqa': must be NAME=PATH, such as lambada="),
        (("--tasks", "piqa=a", "piqa=b"), "rwkv: --tasks 'piqa=b': piqa is named twice"),
        (("--tasks", "piqa=PIQA", "--limit", "0"), "rwkv: --limit 0: must be a whole number, not less than 1"),
        (("--tasks", "piqa=PIQA", "--num-fewshot", "5"), "rwkv: --num-fewshot 5: piqa has 5 examples to draw from"),
        (("--tasks", "piqa=PIQA", "--slots", "0"), "rwkv: --slots 0: must be a whole number, not less than 1"),
        (("--tasks", "piqa=PIQA"), "rwkv: no-such-weights.pth: "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_weights_are_loaded(
    rwkv: Command, piqa: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        rwkv("evaluate", "no-such-weights.pth", *(each.replace("PIQA", str(piqa)) for each in arguments))
    assert str(error.value).startswith(message)


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_runs(
    rwkv: Command, piqa: Path, tmp_path: Path
) -> None:
    save_pretrained(random_model(ModelConfig(vocab_size=300, num_layers=2, width=64)), tmp_path / "model.pth")
    with pytest.raises(SystemExit, match="does not match, it has 257 entries and the model has vocab_size = 300"):
        rwkv("evaluate", tmp_path / "model.pth", "--tasks", f"piqa={piqa}", "--tokenizer", "bytes")
