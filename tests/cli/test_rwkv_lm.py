"""Flags of RWKV-LM's trainer beside ours: all fields exist, the page has the table, an error names ours."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.cli.rwkv_lm import FLAGS, refuse_official_flags, table
from rwkv_jax.cli.train_config import parse_train_config
from rwkv_jax.config import ConfigError, TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "from-rwkv-lm.md"


@pytest.mark.parametrize("name", FLAGS)
def test_every_field_that_is_named_exists(name: str) -> None:
    for field in FLAGS[name].fields:
        section: Any = TrainConfig()
        for part in field.split("."):
            assert part in {each.name for each in dataclasses.fields(section)}, field
            section = getattr(section, part)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_the_help_names_their_flags_beside_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column
    with pytest.raises(SystemExit):
        parse_train_config(["--help"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"RWKV-LM: ([\w, │\n]+)\.", text))))
    assert named >= {name for name, ours in FLAGS.items() if ours.fields}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--lr_init", "6e-4"], r"--lr_init is a flag of RWKV-LM's trainer; here: --optimizer.learning-rate \(docs/"),
        (["--run-dir", "x", "--micro_bsz=4"], r"--micro_bsz .*: --training.batch-size; over all devices: micro_bsz"),
        (["--ds_bucket_mb", "2"], r"--ds_bucket_mb .*; here: XLA plans its own transfers"),
    ],
)
def test_an_official_flag_is_refused_with_ours(arguments: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_train_config(arguments)


def test_our_own_flags_pass() -> None:
    refuse_official_flags(["configs/x.py", "--run-dir", "lr_init", "--optimizer.beta1", "0.9", "--seed", "3"])
