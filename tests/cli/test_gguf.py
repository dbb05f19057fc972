"""`rwkv convert`, `info` and `generate` with files of llama.cpp and rwkv.cpp."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.weights.ggml.gguf_file import read_gguf
from rwkv_jax.weights.pth.file import write_torch_file
from tests.cli.commands import Command
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors, tensors_in, trained_like
from tests.weights.forged_ggml import ggmf_model, gguf_model

CONFIG = dataclasses.replace(CONFIGS["7"], vocab_size=256, width=64, head_dim=16)


def test_to_gguf_and_back(rwkv: Command, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    tensors = trained_like(CONFIG)
    write_torch_file(tmp_path / "a.pth", tensors)
    printed = rwkv("convert", tmp_path / "a.pth", tmp_path / "a.gguf", "--tokenizer", "bytes").out
    assert printed.startswith(f"{tmp_path / 'a.gguf'}: RWKV-7 3 x 64, ")
    assert "vocabulary 256, gguf names" in printed
    found = rwkv("info", tmp_path / "a.gguf").out
    assert re.search(r"weights +.*a\.gguf, gguf names", found)
    assert re.search(r"model +RWKV-7, 3 layers of width 64, vocabulary 256", found)
    assert re.search(r"tensors +\d+ \(\d+ in float32\)", found)
    assert "none in the file" in found
    assert re.search(r"ranks +decay 4, iclr 5, value 6, gate 7", found)
    assert re.search(r"tokenizer +in the file, of llama\.cpp's kind 'rwkv', with 256 tokens", found)
    assert "unusual" not in found
    assert re.search(r"unusual +nothing", rwkv("info", tmp_path / "a.gguf", "--numbers").out)
    rwkv("convert", tmp_path / "a.gguf", tmp_path / "b.safetensors")
    assert_same_bits(tensors_in(tmp_path / "b.safetensors"), tensors)
    wanted = rwkv("generate", tmp_path / "a.pth", "--tokenizer", "bytes", "--prompt", "ab", "--temperature", 0).out
    assert rwkv("generate", tmp_path / "a.gguf", "--prompt", "ab", "--temperature", 0).out == wanted


def test_matrices_in_eight_bits(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    printed = rwkv("convert", run_dir, tmp_path / "a.gguf", "--dtype", "q8_0")
    assert "RWKV-7 2 x 32" in printed.out
    assert read_gguf(tmp_path / "a.gguf").tensors["output.weight"].type.name == "q8_0"
    assert re.search(r"tensors +\d+ \(\d+ in float32, \d+ in q8_0\)", rwkv("info", tmp_path / "a.gguf").out)


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("b.pth", ("--dtype", "q8_0"), "--dtype 'q8_0': is for FILE.gguf"),
        ("b.gguf", ("--quantize", "int8"), "--quantize 'int8': GGUF files take --dtype q8_0; leave --quantize out"),
        ("b.gguf", ("--layout", "flash-linear-attention"), "GGUF files have names of their own"),
    ],
)
def test_what_does_not_go_together(
    rwkv: Command, tmp_path: Path, target: str, flags: tuple[str, ...], message: str
) -> None:
    write_torch_file(tmp_path / "a.pth", random_tensors(CONFIG))
    with pytest.raises(SystemExit, match=re.escape(message)):
        rwkv("convert", tmp_path / "a.pth", tmp_path / target, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_numbers_of_any_layout_are_looked_at(rwkv: Command, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["blocks.1.ffn.value.weight"][2, 3:5] = (np.nan, np.inf)
    (tmp_path / "a.gguf").write_bytes(gguf_model(CONFIG, tensors).bytes())
    told = rwkv("info", tmp_path / "a.gguf", "--numbers").out
    assert "blocks.1.ffn.value.weight has 2 numbers that are NaN or infinite" in told


def test_an_older_file_of_rwkv_cpp(rwkv: Command, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    (tmp_path / "a.bin").write_bytes(ggmf_model(CONFIG, tensors).bytes())
    assert "a.bin, ggmf names" in rwkv("info", tmp_path / "a.bin").out
    rwkv("convert", tmp_path / "a.bin", tmp_path / "b.pth")
    assert_same_bits(tensors_in(tmp_path / "b.pth"), tensors)
