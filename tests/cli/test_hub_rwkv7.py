"""`rwkv info` and `rwkv convert` of folders of the RWKV organization on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.sources import open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.cli.commands import Command
from tests.weights.files import assert_same_bits, random_tensors, tensors_in
from tests.weights.rwkv7_folders import FIELDS, SEVEN, foreign, write_folder, zeros


def run_info(rwkv: Command, path: Path, *flags: str) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in rwkv("info", path, *flags).out.splitlines())
    return {name.strip(): value.strip() for name, value in lines}


def test_info_names_the_layout(tmp_path: Path, rwkv: Command) -> None:
    tensors = random_tensors(SEVEN)
    folder = write_folder(tmp_path / "a", foreign(tensors | zeros()))
    told = run_info(rwkv, folder)
    assert told["weights"] == f"{folder / 'model.safetensors'}, huggingface names"
    assert told["model"] == "RWKV-7, 3 layers of width 32, vocabulary 29"
    assert told["tensors"].startswith("105 (105 in float32)")
    assert "v0" not in told["unusual"]
    convert(folder, tmp_path / "b", layout="huggingface")
    assert run_info(rwkv, tmp_path / "b", "--verify")["checksums"] == "all are right"
    path = tmp_path / "b" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged, it differs from its checksum"):
        open_weights(path).file.verify()
    tied = foreign(tensors)
    del tied["head.weight"]
    write_folder(tmp_path / "tied", tied, FIELDS | {"tie_word_embeddings": True})
    assert run_info(rwkv, tmp_path / "tied")["weights"].endswith("model.safetensors, huggingface names")


def test_convert_by_the_command(tmp_path: Path, rwkv: Command) -> None:
    tensors = random_tensors(SEVEN)
    write_safetensors(tmp_path / "a.safetensors", tensors)
    printed = rwkv("convert", tmp_path / "a.safetensors", tmp_path / "b", "--layout", "huggingface").out
    assert printed.endswith("vocabulary 29, huggingface names\n")
    assert {"README.md", "config.json", "model.safetensors"} == {path.name for path in (tmp_path / "b").iterdir()}
    assert_same_bits(tensors_in(tmp_path / "b"), tensors)
