"""Ours against the official `rwkv` package, which loads what we write and whose files we load: `make test-peers`."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.pth.file import write_torch_file
from tests.weights.files import assert_same_bits, logits_of, tensors_in, trained_like

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = ROOT / "tests" / "weights" / "pip_oracle.py"

SEVEN = ModelConfig(generation="7", vocab_size=97, num_layers=3, width=128)
CONFIGS = {
    **{name: dataclasses.replace(SEVEN, generation=name) for name in ("4", "5.1", "5.2", "6", "7")},
    "5.0": dataclasses.replace(SEVEN, generation="5.0", exponential_bonus=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_load_ours_and_we_load_theirs_and_the_logits_agree(tmp_path: Path, config: ModelConfig) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    write_torch_file(tmp_path / "first.pth", trained_like(config))
    save_pretrained(from_pretrained(tmp_path / "first.pth"), tmp_path / "ours.pth")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 50)
    np.save(tmp_path / "tokens.npy", tokens)
    files = [tmp_path / name for name in ("ours.pth", "tokens.npy", "theirs.npz", "theirs.pth")]
    command = [str(PEER), str(PROGRAM), config.generation[0], *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    theirs = np.load(tmp_path / "theirs.npz")
    logits = logits_of(from_pretrained(tmp_path / "theirs.pth"), tokens[None])[0]
    assert logits.std() > 0.3
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, theirs["logits_one_by_one"], rtol=0, atol=1e-4)
    assert_same_bits(tensors_in(tmp_path / "theirs.pth"), tensors_in(tmp_path / "ours.pth"))
