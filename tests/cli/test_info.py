"""`rwkv info`: what a file is, and whether it is whole; `rwkv convert --verify`."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rwkv_jax.data.tokens.binidx import BinidxWriter
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import save_snapshot
from rwkv_jax.weights.pth.file import write_torch_file
from tests.cli.commands import Command
from tests.inference.small_identities import SEVEN, identity_of
from tests.weights.files import CONFIGS, random_tensors

TENSORS = random_tensors(CONFIGS["7"])


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_weights(rwkv: Command, tmp_path: Path) -> None:
    write_torch_file(tmp_path / "x.pth", TENSORS)
    out = rwkv("info", tmp_path / "x.pth", "--verify").out
    assert "x.pth, official names" in out
    assert "RWKV-7, 3 layers of width 32, vocabulary 29" in out
    assert f"{len(TENSORS)} ({len(TENSORS)} in float32)" in out
    assert "all are right" in out
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert "none in the file, so damage cannot be told" in rwkv("info", tmp_path / "theirs.safetensors", "--verify").out
    _damage(tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=r"x\.pth: the entry .* is damaged, it differs from its checksum"):
        rwkv("info", tmp_path / "x.pth", "--verify")
    assert "not compared" in rwkv("info", tmp_path / "x.pth").out
    with pytest.raises(SystemExit, match=r"x\.pth: the entry .* is damaged, it differs from its checksum"):
        rwkv("convert", tmp_path / "x.pth", tmp_path / "y.pth", "--verify")
    with pytest.raises(SystemExit, match=r"theirs\.safetensors has no checksums; leave it out"):
        rwkv("convert", tmp_path / "theirs.safetensors", tmp_path / "y.pth", "--verify")
    assert not (tmp_path / "y.pth").exists()


def test_a_run(rwkv: Command, run_dir: Path) -> None:
    out = rwkv("info", run_dir).out
    assert out.split()[:2] == ["run", str(run_dir)]
    assert "RWKV-7, 2 layers of width 32, vocabulary 300" in out


def test_a_state(rwkv: Command, tmp_path: Path) -> None:
    own = identity_of(SEVEN)
    state, logits = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), (own.state, own.logits))
    save_snapshot(tmp_path / "state", Snapshot(state, logits, 7), own)  # pyright: ignore[reportArgumentType]
    out = rwkv("info", tmp_path / "state").out
    assert "RWKV-7, " in out
    assert "all are right" in out
    _damage(tmp_path / "state")
    with pytest.raises(SystemExit, match=r"state: .* is damaged, it differs from its checksum"):
        rwkv("info", tmp_path / "state")


def test_tokens(rwkv: Command, tmp_path: Path) -> None:
    with BinidxWriter(tmp_path / "x", 257) as writer:
        writer.write([1, 2, 256])
        writer.end_document()
    out = rwkv("info", tmp_path / "x").out
    assert "x.bin and x.idx, 3 in uint16" in out
    assert "all are right" in out
    _damage(tmp_path / "x.bin")
    with pytest.raises(SystemExit, match=r"x\.bin: it or x\.idx has changed since x\.digest\.json was written"):
        rwkv("info", tmp_path / "x.bin")
    (tmp_path / "x.digest.json").unlink()
    assert "none in the file" in rwkv("info", tmp_path / "x.bin").out
