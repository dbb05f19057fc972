"""Weights by the SHA-256 of their files, and by a revision on the hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.weights import pretrained
from rwkv_jax.weights.hub import Origin, origin_of
from rwkv_jax.weights.pinned import files_of, hash_of_weights
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.sources import find_weights
from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError
from tests.weights.files import CONFIGS, random_tensors

TENSORS = random_tensors(CONFIGS["7"])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    return tmp_path / "model.safetensors"


def test_the_hash_is_that_of_the_file(model: Path) -> None:
    assert hash_of_weights(model) == _hash(model)
    for source in (model, model.parent):
        from_pretrained(source, sha256=_hash(model))
    from_pretrained(model, sha256=_hash(model).upper())


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum here")
def test_the_hash_of_shards_is_that_of_what_sha256sum_prints(tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path, TENSORS, max_shard_bytes=20_000)
    command = "LC_ALL=C sha256sum model-*.safetensors model.safetensors.index.json | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert hash_of_weights(index) == printed.split()[0]
    from_pretrained(tmp_path, sha256=printed.split()[0])


def test_every_shard_counts(tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path, TENSORS, max_shard_bytes=20_000)
    assert set(files_of(index)) == set(tmp_path.iterdir())
    before = hash_of_weights(index)
    for shard in files_of(index):
        content = shard.read_bytes()
        if shard != index:
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert hash_of_weights(index) != before
            with pytest.raises(WeightsError, match=r"and its shards, \d files, have the SHA-256"):
                find_weights(tmp_path, sha256=before)
        shard.write_bytes(content)
    assert hash_of_weights(index) == before
    index.unlink()  # the shards by their numbers
    (some, *_) = sorted(tmp_path.iterdir())
    assert set(files_of(some)) == set(tmp_path.iterdir())
    from_pretrained(tmp_path, sha256=hash_of_weights(some))
    some.unlink()
    with pytest.raises(WeightsError, match="shards are missing beside it"):
        find_weights(tmp_path, sha256=before)


def test_another_hash_is_refused_before_anything_is_opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(pretrained, "open_weights", opened)
    asked = "ab" * 32
    message = rf"model\.safetensors: has the SHA-256 {_hash(model)}, and {asked} was asked for; nothing was loaded"
    with pytest.raises(WeightsError, match=message):
        from_pretrained(model, sha256=asked.upper())


def test_a_file_that_is_none_is_hashed_and_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match="and 0000"):
        from_pretrained(tmp_path / "model.pth", sha256="0" * 64)
    with pytest.raises(UnsafeFileError):
        from_pretrained(tmp_path / "model.pth", sha256=_hash(tmp_path / "model.pth"))


def test_an_index_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UnsafeFileError, match="which is no file beside it"):
        find_weights(index, sha256="0" * 64)


@pytest.mark.parametrize(
    "sha256", ["", "0" * 63, "0" * 65, "g" * 64, "sha256:" + "0" * 64, f"{'0' * 64}\n", 5, b"0" * 64, "\uff10" * 64]
)
def test_what_is_no_hash(model: Path, sha256: Any) -> None:
    with pytest.raises(WeightsError, match=r"sha256 = .*: must be 64 hexadecimal digits"):
        from_pretrained(model, sha256=sha256)


@pytest.mark.parametrize(
    "revision", ["", " ", "a b", "-x", "/main", "a..b", "a//b", "x/", "x.", "x.lock", "a\nb", "a" * 256, "é", 5]
)
def test_what_is_no_revision(revision: Any) -> None:
    with pytest.raises(WeightsError, match=r"revision = .*: must be a branch, a tag or a commit"):
        from_pretrained("owner/name", revision=revision)


def test_what_lies_here_has_no_revision(model: Path) -> None:
    for source in (model, model.parent):
        with pytest.raises(WeightsError, match=r"revision = 'main': .* is a file or folder here, and only models on"):
            from_pretrained(source, revision="main")


def test_a_run_has_no_hash(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(WeightsError, match="is a run, whose checkpoints have digests of their own; leave it out"):
        find_weights(tmp_path, sha256="0" * 64)


def test_the_hub_s_cache_tells_repository_and_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--some-name" / "snapshots" / COMMIT
    (snapshot / "sub").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(b"")
    (snapshot / "sub" / "a.pth").symlink_to(tmp_path / "blob")
    for path in (snapshot / "sub" / "a.pth", snapshot / "model.safetensors"):
        assert origin_of(path) == Origin("owner/some-name", COMMIT)
    for path in (tmp_path / "blob", tmp_path / "models--a--b" / "snapshots" / "main" / "x", Path("model.pth")):
        assert origin_of(path) is None
