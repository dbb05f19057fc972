"""`rwkv probe`, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.weights.pretrained import save_pretrained
from tests.cli.commands import Command
from tests.inference.models import CONFIGS, random_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    save_pretrained(random_model(CONFIGS["7"]), path)
    return path


def test_probes_are_printed_and_written(rwkv: Command, weights: Path, tmp_path: Path) -> None:
    out = rwkv(
        "probe", weights, "--tokenizer", "bytes", "--probes", "bias", "robustness", "--num-tokens", 64,
        "--output", tmp_path / "probes",
    ).out  # fmt: skip
    assert "## Bias by paired sentences" in out
    assert "| one token, repeated |" in out
    written = json.loads((tmp_path / "probes" / "probes.json").read_text())
    assert [each["probe"] for each in written["probes"]] == ["bias", "robustness"]
    assert written["model"]["num_layers"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probes", "recal"), "--probes 'recal': no such probe; did you mean recall"),
        (("--probes", "positions"), r"texts = \(\): the probe positions needs some"),
        (("--samples", 1), "--samples 1: must be at least 2"),
        (("--texts", "nowhere.txt"), "--texts 'nowhere.txt': cannot be read"),
    ],
)
def test_what_is_wrong_is_named_before_weights_are_loaded(rwkv: Command, flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        rwkv("probe", "no-such-weights.pth", *flags)
