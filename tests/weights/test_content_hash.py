"""The version and the hash that safetensors of a model have: what they are the hash of, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from rwkv_jax import from_pretrained
from rwkv_jax.weights.content_hash import CONTENT, FORMAT, content_sha256, tensor_line
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.sources import verify_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors

TENSORS = random_tensors(CONFIGS["7"])
NAME = "blocks.1.att.key.weight"


def _by_hand(tensors: dict[str, NDArray]) -> str:
    """The hash as the documentation says it, of float32 tensors whose names are ASCII."""
    lines = [
        f'["{name}","F32",[{",".join(map(str, x.shape))}],"{hashlib.sha256(x.tobytes()).hexdigest()}"]\n'
        for name, x in tensors.items()
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def _with_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Writes tensors as the library does, with metadata and without our checksums."""
    save_file(TENSORS, path, metadata=metadata)


def test_files_have_the_hash_that_is_documented(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", TENSORS, {"format": "pt"}, is_model=True)
    index = write_sharded_safetensors(tmp_path / "shards", TENSORS, max_shard_bytes=20_000)
    assert len(list(index.parent.iterdir())) > 3
    expected = _by_hand(TENSORS)
    for path in (tmp_path / "a.safetensors", index):
        found = read_safetensors(path)
        assert found.content_sha256 == expected
        assert_same_bits(dict(found), TENSORS)
        assert not {FORMAT, CONTENT} & found.metadata.keys()
        assert verify_weights(path)
    assert _header(tmp_path / "a.safetensors").items() >= {FORMAT: "1", CONTENT: expected, "format": "pt"}.items()
    assert json.loads(index.read_text())["metadata"].items() >= {FORMAT: "1", CONTENT: expected}.items()
    assert_same_bits(load_file(tmp_path / "a.safetensors"), TENSORS)


def test_the_hash_knows_no_order_and_no_other_metadata(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", TENSORS, is_model=True)
    write_safetensors(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())), {"x": "y"}, is_model=True)
    contents = {(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"}
    assert len(contents) == 2
    hashes = {read_safetensors(tmp_path / f"{name}.safetensors").content_sha256 for name in "ab"}
    assert hashes == {_by_hand(TENSORS)}


def test_name_dtype_shape_and_numbers_all_count() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    lines = {
        tensor_line("a", "F32", x),
        tensor_line("b", "F32", x),
        tensor_line("a", "I32", x.view(np.int32)),
        tensor_line("a", "F32", x.reshape(3, 2)),
        tensor_line("a", "F32", x.T),
        tensor_line("a", "F32", x + 1),
        tensor_line("é\n", "F32", x),
    }
    assert len({content_sha256([line]) for line in lines}) == 7
    assert all(line.isascii() and line.count("\n") == 1 for line in lines)
    assert tensor_line("a", "F32", x.T) == tensor_line("a", "F32", np.ascontiguousarray(x.T))
    assert tensor_line("a", "F32", np.float32(1) * np.ones(())).startswith('["a","F32",[],')


def test_what_is_converted_has_the_hash_of_what_is_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert read_safetensors(tmp_path / "a.safetensors").content_sha256 is None
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "c", dtype="bfloat16")
    assert read_safetensors(tmp_path / "b.safetensors").content_sha256 == _by_hand(TENSORS)
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in TENSORS.items()}
    found = read_safetensors(tmp_path / "c" / "model.safetensors")
    assert found.content_sha256 == content_sha256(tensor_line(name, "BF16", x) for name, x in rounded.items())


def _swap(path: Path) -> None:
    """Exchanges a tensor for another, as somebody does who mends the checksums, too."""
    changed = {name: x + (name == NAME) for name, x in read_safetensors(path).items()}
    told = _header(path)
    path.unlink()
    write_safetensors(path, changed, {name: told[name] for name in (FORMAT, CONTENT)})


def test_other_tensors_under_the_same_hash_are_found(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", TENSORS, is_model=True)
    _swap(tmp_path / "a.safetensors")
    message = r"a\.safetensors: a\.safetensors has other tensors than those that it has the SHA-256 of; get the file"
    with pytest.raises(WeightsError, match=message):
        verify_weights(tmp_path / "a.safetensors")
    from_pretrained(tmp_path / "a.safetensors")  # which compares nothing


def test_a_shard_of_another_model_is_found_by_the_index(tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path, TENSORS, max_shard_bytes=20_000)
    (shard,) = (path for path in tmp_path.glob("*.safetensors") if NAME in read_safetensors(path))
    changed = {name: x + (name == NAME) for name, x in read_safetensors(shard).items()}
    shard.unlink()
    write_safetensors(shard, changed, is_model=True)  # whole in itself
    read_safetensors(shard).verify()
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json has other tensors than those that it"):
        verify_weights(index)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2", r"was written by a later rwkv-jax, in version 2 of its form, of which this one reads up to 1; install a"),
        ("999999999", "in version 999999999 of its form"),
        ("1.5", r"rwkv_jax\.format is '1\.5', which is no version; get the file again"),
        ("9" * 5000, rf"rwkv_jax\.format is '{'9' * 39}, which is no version"),
        ("", r"rwkv_jax\.format is '', which is no version"),
        ("\uff11", r"rwkv_jax\.format is '\\uff11', which is no version"),
    ],
)
def test_another_version_is_refused(tmp_path: Path, version: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    _with_metadata(path, {FORMAT: version})
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: .*{message}"):
        from_pretrained(path)
    index = write_sharded_safetensors(tmp_path / "x", TENSORS, max_shard_bytes=20_000)
    record = json.loads(index.read_text())
    record["metadata"][FORMAT] = version
    index.write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=f"{re.escape(str(index))}: .*{message}"):
        from_pretrained(index.parent)


def test_files_of_others_are_read(tmp_path: Path) -> None:
    for number, metadata in enumerate(
        ({}, {"format": "pt"}, {"sha256": "0" * 64}, {FORMAT: "1"}, {CONTENT: "no hash"})
    ):
        _with_metadata(tmp_path / f"{number}.safetensors", metadata)
        from_pretrained(tmp_path / f"{number}.safetensors")
    assert not verify_weights(tmp_path / "2.safetensors")
    with pytest.raises(WeightsError, match="has other tensors than those"):
        verify_weights(tmp_path / "4.safetensors")
    index = write_sharded_safetensors(tmp_path / "x", TENSORS, max_shard_bytes=20_000)
    for metadata in (None, [], {"total_size": 1}, {CONTENT: 5}):
        record = json.loads(index.read_text())
        index.write_text(json.dumps(record | {"metadata": metadata}))
        assert read_safetensors(index).content_sha256 is None
