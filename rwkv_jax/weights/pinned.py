"""Weights that are named exactly: by a revision on the hub, and by the SHA-256 of their files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from rwkv_jax.checks import shown
from rwkv_jax.weights.shards import is_index, is_numbered, numbered_names, read_index
from rwkv_jax.weights.tensors import WeightsError

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|[./]$|\.lock$))\w[\w./-]{0,254}", re.ASCII)
_BLOCK = 2**24  # bytes of a file that are hashed at a time


def check_revision(revision: object) -> None:
    """Raises WeightsError for what cannot be a branch, a tag or a commit."""
    if not isinstance(revision, str) or _REVISION.fullmatch(revision) is None:
        raise WeightsError(
            f"revision = {shown(revision)}: must be a branch, a tag or a commit on the hub, such as main"
        )


def check_hash(sha256: object) -> None:
    """Raises WeightsError for what is no SHA-256 in hex."""
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise WeightsError(f"sha256 = {shown(sha256)}: must be 64 hexadecimal digits, as sha256sum prints them")


def files_of(path: Path) -> list[Path]:
    """All files of weights that a path stands for: one, or the shards and their index, by name.

    Raises as `read_index` and `numbered_names`.
    """
    names = [path.name]
    if is_index(path.name):
        names += read_index(path).promised
    elif is_numbered(path.name):
        names = numbered_names(path)
    return [path.with_name(name) for name in sorted(names)]


def hash_of_weights(path: Path) -> str:
    """SHA-256 in hex of weights: of their file, as `sha256sum` prints it, or of all its lines for several files.

    That is of a line `HASH  NAME`, with two blanks, for each shard and the index, sorted by name:
    `LC_ALL=C sha256sum model-*.safetensors model.safetensors.index.json | sha256sum`.
    """
    files = files_of(path)
    if files == [path]:
        return _hash_of_file(path)
    return hashlib.sha256("".join(f"{_hash_of_file(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def require_hash(path: Path, sha256: str) -> None:
    """Raises WeightsError unless weights have this SHA-256; nothing of them is opened but to be hashed."""
    if path.is_dir():
        raise WeightsError(
            f"sha256 = {sha256!r}: {path} is a run, whose checkpoints have digests of their own; leave it out"
        )
    found, files = hash_of_weights(path), len(files_of(path))
    if found != sha256.lower():
        what = "has" if files == 1 else f"and its shards, {files} files, have"
        raise WeightsError(
            f"{path}: {what} the SHA-256 {found}, and {sha256.lower()} was asked for; nothing was loaded. Get the file "
            "again, or ask for this one if it is the one that is meant"
        )


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); name a file of weights") from error
    return digest.hexdigest()
