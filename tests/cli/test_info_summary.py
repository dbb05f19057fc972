"""`rwkv info` of weights: all that names and shapes tell, at once and without JAX."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.provenance import provenance_of_source
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from tests.cli.commands import Command
from tests.weights.files import CONFIGS, random_tensors
from tests.weights.sparse_files import sparse_pth, sparse_safetensors

ROOT = Path(__file__).parents[2]
TENSORS = random_tensors(CONFIGS["7"])
_PROGRAM = """
import sys
from rwkv_jax.cli import main
main(["info", sys.argv[1]])
sys.exit("jax" in sys.modules)
"""
_SECONDS = 3.0  # alone it takes less than one (docs/weights.md); other tests run beside this one


@pytest.mark.parametrize(
    ("name", "write", "prefix"),
    [
        ("a.pth", sparse_pth, ""),
        ("a.safetensors", sparse_safetensors, ""),
        ("a.safetensors", sparse_safetensors, "rwkv7."),
    ],
    ids=["pth", "safetensors", "huggingface"],
)
def test_three_gigabytes_take_a_second_and_no_jax(
    tmp_path: Path, name: str, write: Callable[[Path, Mapping[str, tuple[int, ...]]], None], prefix: str
) -> None:
    shapes = official_shapes(ModelConfig(generation="7", vocab_size=65536, num_layers=24, width=2048))
    write(tmp_path / name, {x if x == "head.weight" else prefix + x: shape for x, shape in shapes.items()})
    assert (tmp_path / name).stat().st_size > 3 * 10**9
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        times.append(time.perf_counter() - begin)
        assert (done.returncode, done.stderr) == (0, "")
    for told in (
        "RWKV-7, 24 layers of width 2048, vocabulary 65536",
        "decay 128, ",
        "M, computed in bfloat16",
        "in bfloat16), 3",
        "none recorded; --hash computes it",
        "by the vocabulary's size world",
        f"{name}, {'huggingface' if prefix else 'official'} names",
    ):
        assert told in done.stdout
    assert min(times) < _SECONDS


def test_what_is_unusual(rwkv: Command, tmp_path: Path) -> None:
    tensors = TENSORS | {"head.weight": TENSORS["emb.weight"]}
    tensors["ln_out.bias"] = tensors["ln_out.bias"].astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "a.safetensors", tensors)
    out = rwkv("info", tmp_path / "a.safetensors").out
    for told in (
        "decay_rank is 4; for this width the official trainer takes 32",
        "several dtypes; bfloat16: ln_out.bias",
        "tied: head.weight is emb.weight",
        "blocks.0.att.v0, v1, v2 are missing",
        "none beside it, and none known of 29 ids",
        "decay 4, iclr 5, value 6, gate 7",
    ):
        assert told in out
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json beside it" in rwkv("info", tmp_path / "a.safetensors").out


def test_other_tensors_are_listed(rwkv: Command, tmp_path: Path) -> None:
    extra = np.zeros((2, 2), np.float32)
    save_file(TENSORS | {"blocks.2.att.more": extra}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match=r"not expected blocks\.2\.att\.more \[2, 2\]"):
        rwkv("info", tmp_path / "a.safetensors")
    write_torch_file(tmp_path / "b.pth", {k: v for k, v in TENSORS.items() if k != "blocks.1.ffn.key.weight"})
    with pytest.raises(SystemExit, match=r"missing      blocks\.1\.ffn\.key\.weight"):
        rwkv("info", tmp_path / "b.pth")


def test_without_a_head_the_embedding_is_it(rwkv: Command, tmp_path: Path) -> None:
    save_file({k: v for k, v in TENSORS.items() if k != "head.weight"}, tmp_path / "a.safetensors")
    assert "tied: there is no head.weight" in rwkv("info", tmp_path / "a.safetensors").out
    rwkv("convert", tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert "tied: head.weight is emb.weight" in rwkv("info", tmp_path / "b.pth").out
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(SystemExit, match=r"missing      head\.weight"):
        rwkv("info", tmp_path / "a.safetensors")


def test_numbered_shards_are_no_tokens(rwkv: Command, tmp_path: Path) -> None:
    names = list(TENSORS)
    halves = [{name: TENSORS[name] for name in names[i::2]} for i in range(2)]
    for i, half in enumerate(halves):
        write_torch_file(tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin", half)
    for source in (tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path):
        assert f"{len(TENSORS)} ({len(TENSORS)} in float32)" in rwkv("info", source).out
    untied = {name: x for name, x in halves[1].items() if name != "head.weight"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    write_torch_file(tmp_path / "pytorch_model-00002-of-00002.bin", untied)
    assert "tied: there is no head.weight" in rwkv("info", tmp_path / "pytorch_model-00001-of-00002.bin").out


def test_hashes(rwkv: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"sha256": "cd" * 32, "rwkv_jax.sha256": "ef" * 32})
    told = rwkv("info", path).out
    assert "none recorded; --hash computes it" in told
    assert "cd" * 32 not in told  # anybody's, of who knows what
    assert "ef" * 32 not in told
    true = hashlib.sha256(path.read_bytes()).hexdigest()
    assert true in rwkv("info", path, "--hash").out
    (tmp_path / ("ab" * 32)).write_bytes(path.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(tmp_path / ("ab" * 32))
    assert f"{'ab' * 32}, by the hub's cache" in rwkv("info", tmp_path / "link.safetensors").out
    assert "RWKV-7" in rwkv("info", path, "--sha256", true).out
    with pytest.raises(SystemExit, match=rf"has the SHA-256 {true}, and 0{{64}} was asked for; nothing was loaded"):
        rwkv("info", path, "--sha256", "0" * 64)


def test_a_stored_shard_s_hash_is_not_that_of_all(rwkv: Command, tmp_path: Path) -> None:
    names = list(TENSORS)
    for i in range(2):
        stored = tmp_path / "blobs" / (f"{i}b" * 32)
        stored.parent.mkdir(exist_ok=True)
        write_torch_file(stored, {name: TENSORS[name] for name in names[i::2]})
        (tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin").symlink_to(stored)
    told = rwkv("info", tmp_path / "pytorch_model-00001-of-00002.bin").out
    assert "none recorded; --hash computes it" in told
    assert "0b" * 32 not in told


def test_what_is_no_hash_is_not_shown(rwkv: Command, tmp_path: Path) -> None:
    forged = "x\n\x1b[2KSHA-256   " + "ab" * 32
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"rwkv_jax.content_sha256": forged})
    index = write_sharded_safetensors(tmp_path / "b", TENSORS, max_shard_bytes=20_000)
    record = json.loads(index.read_text())
    record["metadata"]["rwkv_jax.content_sha256"] = forged
    index.write_text(json.dumps(record))
    for path in (tmp_path / "a.safetensors", tmp_path / "b"):
        told = rwkv("info", path).out
        assert "of tensors" not in told
        assert "ab" * 32 not in told
        assert "\x1b" not in told
        assert "ab" * 32 not in str(provenance_of_source(path))


def test_hashes_of_what_we_wrote(rwkv: Command, tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path / "a", TENSORS, max_shard_bytes=20_000)
    content = json.loads(index.read_text())["metadata"]["rwkv_jax.content_sha256"]
    assert f"{content}, not compared" in rwkv("info", tmp_path / "a").out
    told = rwkv("info", index, "--verify", "--hash").out
    assert f"{content}, compared" in told
    (whole,) = (line.split()[1] for line in told.splitlines() if line.startswith("SHA-256"))
    assert "RWKV-7" in rwkv("info", tmp_path / "a", "--sha256", whole).out
    with pytest.raises(SystemExit, match=r"--revision 'main': .* is a file or folder here"):
        rwkv("info", tmp_path / "a", "--revision", "main")


def test_a_file_of_the_hub_s_cache_says_where_it_is_from(rwkv: Command, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / ("12" * 20)
    write_safetensors(folder / "model.safetensors", TENSORS)
    assert f"owner/name on the Hugging Face hub, commit {'12' * 20}" in rwkv("info", folder).out


def test_large_numbers_of_float64_are_finite(rwkv: Command, tmp_path: Path) -> None:
    wide = {name: x.astype(np.float64) for name, x in TENSORS.items()}
    wide["ln_out.bias"][0] = 1e300
    write_safetensors(tmp_path / "a.safetensors", wide)
    assert "infinite" not in rwkv("info", tmp_path / "a.safetensors", "--numbers").out


def test_shapes_are_compared_on_request(rwkv: Command, tmp_path: Path) -> None:
    tensors = {name: x.reshape(-1) if name.endswith("att.x_k") else x for name, x in TENSORS.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert "not compared one by one" in rwkv("info", tmp_path / "a.safetensors").out
    with pytest.raises(SystemExit, match=r"misshapen +blocks\.0\.att\.x_k is \[32\], must be \[1, 1, 32\]"):
        rwkv("info", tmp_path / "a.safetensors", "--verify")


def test_numbers(rwkv: Command, tmp_path: Path) -> None:
    config = ModelConfig(generation="4", vocab_size=29, num_layers=13, width=32, ffn_width=48)
    tensors = random_tensors(config)
    for layer in range(13):
        tensors[f"blocks.{layer}.att.output.weight"] /= 2 ** (layer // 6)
    tensors["ln_out.bias"][3] = np.nan
    save_file(tensors, tmp_path / "a.safetensors")
    assert "NaN" not in rwkv("info", tmp_path / "a.safetensors").out
    out = rwkv("info", tmp_path / "a.safetensors", "--numbers").out
    assert "ln_out.bias has 1 numbers that are NaN or infinite" in out
    assert "half as large after every 6 layers" in out


def test_what_the_rwkv_package_converted_is_refused(rwkv: Command, tmp_path: Path) -> None:
    save_file(TENSORS | {"_rescale_layer": np.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="converted by the rwkv package: it transposes"):
        rwkv("info", tmp_path / "a.safetensors")
