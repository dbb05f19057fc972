"""Ours against `rwkv7-hf`, which loads what we write and whose folders we load: `make test-peers`.

It has the names of flash-linear-attention. The names of the layout huggingface are those of a class proposed for
transformers, which no release has.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.sources import find_weights, open_weights
from tests.weights.files import assert_same_bits, logits_of, tensors_in, trained_like

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = ROOT / "tests" / "weights" / "rwkv7_hf_oracle.py"

CONFIG = ModelConfig(generation="7", vocab_size=97, num_layers=3, width=128)


def test_it_loads_ours_and_we_load_its_and_the_logits_agree(tmp_path: Path) -> None:
    """What is written by way of the layout huggingface, so that each of the two gives all numbers to the other."""
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    tensors = trained_like(CONFIG)
    write_torch_file(tmp_path / "a.pth", tensors)
    convert(tmp_path / "a.pth", tmp_path / "hub", layout="huggingface")
    convert(tmp_path / "hub", tmp_path / "ours", layout="flash-linear-attention")
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 50))
    np.save(tmp_path / "tokens.npy", tokens)
    names = ("ours", "tokens.npy", "theirs.npz", "saved", "a.pth", "converted")
    command = [str(PEER), str(PROGRAM), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    theirs = np.load(tmp_path / "theirs.npz")
    assert theirs["unloaded"].tolist() == []
    logits = logits_of(from_pretrained(tmp_path / "hub"), tokens)
    assert logits.std() > 0.3
    for name in ("saved", "converted"):
        assert open_weights(find_weights(tmp_path / name)).layout == "flash-linear-attention"
        np.testing.assert_array_equal(logits_of(from_pretrained(tmp_path / name), tokens), logits)
        assert_same_bits(tensors_in(tmp_path / name), tensors)
    np.testing.assert_allclose(theirs["logits"], logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(theirs["logits_one_by_one"], logits, rtol=0, atol=1e-4)
