"""pytorch_model-*.bin with an index are read as one file, and an index that is not as its shards are is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.weights.layouts import to_layout
from rwkv_jax.weights.pth.file import read_torch_file, write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError
from tests.weights import forged
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors

TENSORS = random_tensors(CONFIGS["4"])
INDEX = "pytorch_model.bin.index.json"
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """RWKV-4 as transformers 4 wrote it: half of the tensors in each of two shards."""
    foreign = dict(to_layout(TENSORS, "transformers"))
    names = list(foreign)
    half = len(names) // 2
    for shard, own in ((FIRST, names[:half]), (SECOND, names[half:])):
        write_torch_file(tmp_path / shard, {name: foreign[name] for name in own})
    shard_of = {name: FIRST if i < half else SECOND for i, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": shard_of}))
    return tmp_path / INDEX


def change(index: Path, shard_of: dict[str, str]) -> None:
    record = json.loads(index.read_text())
    index.write_text(json.dumps(record | {"weight_map": record["weight_map"] | shard_of}))


def test_shards_by_torch_are_read_as_one_file(index: Path) -> None:
    for source in (index, index.parent):
        opened = open_weights(find_weights(source))
        assert opened.layout == "transformers"
        assert_same_bits({name: opened.tensors[name] for name in TENSORS}, TENSORS)
        opened.drop_pages()
        assert_same_bits({name: opened.tensors[name] for name in TENSORS}, TENSORS)


@pytest.mark.parametrize("shard", ["../x.bin", "/x.bin", "a/x.bin", "..\\x.bin", "C:x.bin", "x.pth", "x.bin\0", ""])
def test_no_shard_is_looked_for_elsewhere(index: Path, shard: str) -> None:
    write_torch_file(index.parent.parent / f"{index.parent.name}-x.bin", {"b": np.ones(4)})
    change(index, {"b": shard})
    with pytest.raises(UnsafeFileError, match="which is no file beside it; nothing was read"):
        read_torch_file(index)


def test_an_index_must_agree_with_its_shards(index: Path) -> None:
    change(index, {"more": FIRST})
    with pytest.raises(UnsafeFileError, match=rf"{FIRST}: the index promises tensors that the shard lacks: more;"):
        read_torch_file(index)
    change(index, {"more": "pytorch_model-00003-of-00003.bin"})
    with pytest.raises(WeightsError, match=r"shards are missing beside it: pytorch_model-00003-of-00003\.bin; get"):
        read_torch_file(index)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_malformed_index_is_refused(index: Path, content: str) -> None:
    index.write_text(content)
    with pytest.raises(UnsafeFileError, match=rf"{INDEX}: (its JSON|has no weight_map)"):
        read_torch_file(index)


def test_a_shard_is_no_safer_than_a_file(index: Path) -> None:
    index.with_name(FIRST).write_bytes(forged.torch_file(b"\x80\x02cos\nsystem\n."))
    with pytest.raises(UnsafeFileError, match=rf"{FIRST}: .*names 'os\.system'"):
        read_torch_file(index)


def test_a_shard_that_is_only_a_pointer_is_named(index: Path) -> None:
    index.with_name(SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000\n")
    with pytest.raises(UnsafeFileError, match=rf"{SECOND}: .*: it is a Git LFS pointer to 5,000 bytes.*git lfs pull"):
        read_torch_file(index)


def test_a_shard_that_was_converted_is_found(index: Path) -> None:
    index.with_name(SECOND).write_bytes(
        forged.torch_file(forged.state(forged.GOOD + forged.text("_strategy") + forged.text("cpu fp32")))
    )
    index.write_text(json.dumps({"weight_map": {"w": SECOND}}))
    with pytest.raises(WeightsError, match=r"converted by the rwkv package with strategy 'cpu fp32'"):
        open_weights(index)


def test_numbered_shards_need_no_index(index: Path) -> None:
    index.unlink()
    for source in (index.parent, index.with_name(FIRST), index.with_name(SECOND)):
        opened = open_weights(find_weights(source))
        assert_same_bits({name: opened.tensors[name] for name in TENSORS}, TENSORS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbered_shards_of_other_kinds(tmp_path: Path, suffix: str) -> None:
    write = write_torch_file if suffix == ".pth" else write_safetensors
    for i in range(3):
        own = {name: x for k, (name, x) in enumerate(TENSORS.items()) if k % 3 == i}
        write(tmp_path / f"a-0000{i + 1}-of-00003{suffix}", own)
    opened = open_weights(find_weights(tmp_path))
    assert_same_bits({name: opened.tensors[name] for name in TENSORS}, TENSORS)


def test_numbered_shards_that_are_no_set_are_refused(index: Path) -> None:
    index.unlink()
    second = index.with_name(SECOND)
    content = second.read_bytes()
    second.write_bytes(index.with_name(FIRST).read_bytes())
    with pytest.raises(UnsafeFileError, match=rf"{SECOND}: .* is also in {FIRST}; these are not the shards of one"):
        open_weights(find_weights(index.parent))
    second.write_bytes(content[:-9])
    with pytest.raises(UnsafeFileError, match=rf"{SECOND}: "):
        open_weights(find_weights(index.parent))
    second.unlink()
    with pytest.raises(WeightsError, match=rf"shards are missing beside it: {SECOND}; get them"):
        open_weights(find_weights(index.parent))


@pytest.mark.parametrize("name", ["a-00000-of-00000.bin", "a-00003-of-00002.bin", "a-00001-of-99999.bin"])
def test_numbers_that_cannot_be_are_refused(index: Path, name: str) -> None:
    (index.parent / name).write_bytes(index.with_name(FIRST).read_bytes())
    with pytest.raises(UnsafeFileError, match=rf"{name}: is no shard of 1 to 10000, by its name"):
        open_weights(index.parent / name)


def test_a_numbered_shard_that_was_converted_is_found(index: Path) -> None:
    index.unlink()
    index.with_name(SECOND).unlink()
    write_torch_file(index.with_name(SECOND), {"_rescale_layer": np.zeros(1)})
    with pytest.raises(WeightsError, match="converted by the rwkv package"):
        open_weights(find_weights(index.parent))
