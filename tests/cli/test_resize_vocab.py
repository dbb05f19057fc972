"""`rwkv convert --resize-vocab` beside a tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rwkv_jax.data.tokenizers import load_tokenizer, save_tokenizer
from rwkv_jax.weights.pth.file import write_torch_file
from tests.cli.commands import Command
from tests.weights.files import CONFIGS, random_tensors


def test_rows_that_a_tokenizer_uses_stay(rwkv: Command, tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(dataclasses.replace(CONFIGS["7"], vocab_size=257)))
    save_tokenizer(load_tokenizer("bytes", 257), tmp_path)
    with pytest.raises(SystemExit, match="has 257 ids, whose rows would be cut"):
        rwkv("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--resize-vocab", "200")
    rwkv("convert", tmp_path / "a.pth", tmp_path / "b", "--resize-vocab", "200", "--cut-used")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README.md", "model.safetensors"]
    with pytest.raises(SystemExit, match=r"cut.used.*: says which rows"):
        rwkv("convert", tmp_path / "a.pth", tmp_path / "c.pth", "--cut-used")
