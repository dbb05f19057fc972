"""Checksums of weights: in safetensors that we write and in every .pth, compared on demand; of packed ones always."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.sources import verify_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, random_tensors

TENSORS = random_tensors(CONFIGS["7"])
NAME = "blocks.1.att.key.weight"


def _flip(path: Path, name: str = NAME, tensors: dict[str, Any] = TENSORS) -> None:
    """Flips a bit of one tensor."""
    content = bytearray(path.read_bytes())
    content[content.index(tensors[name].tobytes()) + 5] ^= 1
    path.write_bytes(content)


def test_a_whole_file_is_verified(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    write_torch_file(tmp_path / "x.pth", TENSORS)
    assert verify_weights(tmp_path / "x.safetensors")
    assert verify_weights(tmp_path / "x.pth")


def test_checksums_are_those_of_zlib(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": np.frombuffer(b"123456789", np.uint8)})
    header = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert json.loads(header["__metadata__"]["checksums"])["a"] == 0xCBF43926


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_bit_that_has_changed_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    (write_torch_file if suffix == "pth" else write_safetensors)(path, TENSORS)
    _flip(path)
    from_pretrained(path)  # which reads each number once, and trusts it
    message = NAME if suffix == "safetensors" else r"the entry data/\d+ of x\.pth"
    with pytest.raises(
        WeightsError, match=rf"x\.{suffix}: {message} is damaged, it differs from its checksum; get the"
    ):
        verify_weights(path)


def test_a_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path, TENSORS, max_shard_bytes=20_000)
    assert verify_weights(index)
    for shard in tmp_path.glob("*.safetensors"):
        if NAME in read_safetensors(shard):
            _flip(shard)
    with pytest.raises(WeightsError, match=f"{re.escape(NAME)} is damaged"):
        verify_weights(tmp_path)


def test_a_dtype_that_has_changed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    file = read_safetensors(path)
    with pytest.raises(WeightsError, match=r"the header of x\.safetensors is damaged"):
        file.verify()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_are_verified_when_they_are_loaded(tmp_path: Path, quantize: Any) -> None:
    path = tmp_path / "packed.safetensors"
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    save_pretrained(from_pretrained(tmp_path / "x.safetensors", quantize=quantize), path)
    packed = load_file(path)
    for name in (f"{NAME}.scale", "ln_out.weight"):
        whole = path.read_bytes()
        _flip(path, name, packed)
        with pytest.raises(WeightsError, match=rf"packed\.safetensors: {re.escape(name)} is damaged"):
            from_pretrained(path)
        path.unlink()  # it may be mapped
        path.write_bytes(whole)
    from_pretrained(path)


def test_files_without_checksums_are_taken_as_they_are(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert not verify_weights(tmp_path / "theirs.safetensors")
    save_file(TENSORS, tmp_path / "odd.safetensors", metadata={"checksums": "[" * 100_000})
    assert not verify_weights(tmp_path / "odd.safetensors")
