"""`rwkv convert`: what it writes, and what it says."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import from_pretrained
from rwkv_jax.training import checkpoints as ckpt
from tests.cli.commands import Command


def test_a_run_becomes_official_weights_and_says_so(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    printed = rwkv("convert", run_dir, tmp_path / "a", "--layout", "flash-linear-attention").out
    assert printed.startswith(f"{tmp_path / 'a'}: RWKV-7 2 x 32, ")
    assert printed.endswith("vocabulary 300, flash-linear-attention names\n")
    assert {"config.json", "model.safetensors", "tokenizer.model"} == {p.name for p in (tmp_path / "a").iterdir()}
    rwkv("convert", tmp_path / "a", tmp_path / "b.pth", "--dtype", "bfloat16")
    newest = ckpt.load_model(run_dir, "newest")
    ours = from_pretrained(tmp_path / "b.pth", dtype="float32")
    expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), newest.params)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours, nnx.Param)), expected)


def test_what_cannot_be_done_is_said(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ((run_dir, tmp_path / "there"), "there: exists already and is not overwritten"),
        ((tmp_path / "nowhere.pth", tmp_path / "a"), r"nowhere\.pth: no such file or folder"),
        ((run_dir, tmp_path / "a", "--layout", "transformers"), "RWKV-7"),
    ):
        with pytest.raises(SystemExit, match=message):
            rwkv("convert", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
