"""Weights in several files beside an index, a JSON file that maps each tensor's name to its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from rwkv_jax.json_object import parse_object
from rwkv_jax.weights.content_hash import CONTENT, refuse_newer
from rwkv_jax.weights.tensors import MappedTensors, UnsafeFileError, WeightsError, join_names, map_file

INDEX_SUFFIXES = {".safetensors.index.json": ".safetensors", ".bin.index.json": ".bin"}
"""Suffixes of indexes, and of their shards in the same folder."""

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.(?:bin|pth|safetensors))")
_MAX_SHARDS = 10_000

_MAX_INDEX_BYTES = 100 * 10**6  # like the safetensors library's limit for a header


def is_index(name: str) -> bool:
    """Whether a file is an index, by its name."""
    return name.endswith(tuple(INDEX_SUFFIXES))


def shard_pattern(index: str) -> str:
    """The pattern of the names of an index's shards."""
    suffix = next(suffix for suffix in INDEX_SUFFIXES if index.endswith(suffix))
    return f"{index.removesuffix(suffix)}-*{INDEX_SUFFIXES[suffix]}"


def shard_patterns(name: str) -> list[str]:
    """Patterns of what else a file needs by its name: the shards of an index, or those beside one with a number."""
    if is_index(name):
        return [shard_pattern(name)]
    match = _NUMBERED.fullmatch(name)
    return [] if match is None else [f"{match['stem']}-*-of-{match['count']}{match['suffix']}"]


def is_numbered(name: str) -> bool:
    """Whether a name is that of one of several shards, such as pytorch_model-00001-of-00002.bin."""
    return _NUMBERED.fullmatch(name) is not None


def are_one_set(names: Collection[str]) -> bool:
    """Whether names are shards of one model, all with one stem, number of shards and suffix; some may be missing."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    return len({(x["stem"], x["count"], x["suffix"]) for x in matches if x is not None}) == 1 and None not in matches


def read_numbered(path: Path, read: Callable[[Path], MappedTensors]) -> MappedTensors:
    """The tensors of all shards of which a path is one, without their index, each shard as `read` has it.

    Raises:
      WeightsError: a shard is missing, or as `read` does.
      UnsafeFileError: two shards hold the same tensor, or the name counts none or more than `_MAX_SHARDS`.
    """
    shards: list[MappedTensors] = []
    holder: dict[str, str] = {}
    for name in numbered_names(path):
        shards.append(read(path.with_name(name)))
        if twice := [tensor for tensor in shards[-1] if tensor in holder]:
            found = f"{twice[0]} is also in {holder[twice[0]]}"
            raise UnsafeFileError(f"{path.with_name(name)}: {found}; these are not the shards of one model")
        holder |= dict.fromkeys(shards[-1], name)
    return MappedTensors.joined(shards)


def numbered_names(path: Path) -> list[str]:
    """The names of all shards of which a path is one, in order; raises as `read_numbered` if one is missing."""
    match = _NUMBERED.fullmatch(path.name)
    assert match is not None
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MAX_SHARDS:
        raise UnsafeFileError(f"{path}: is no shard of 1 to {_MAX_SHARDS}, by its name; rename it")
    names = [f"{match['stem']}-{i:05}-of-{match['count']}{match['suffix']}" for i in range(1, count + 1)]
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise WeightsError(f"{path}: shards are missing beside it: {join_names(missing)}; get them")
    return names


class Index(NamedTuple):
    """What an index says."""

    promised: dict[str, set[str]]
    """The names of the tensors of each shard."""
    content_sha256: str | None
    """The hash of all tensors, if it has one."""


def read_shards(path: Path, read: Callable[[Path], MappedTensors]) -> MappedTensors:
    """The tensors of all shards of an index, each shard as `read` has it.

    Raises:
      WeightsError: a shard is missing, the index is of a later version than is known, or as `read` does.
      UnsafeFileError: the index leads out of its folder or does not match its shards.
    """
    promised, content = read_index(path)
    shards = []
    for shard in sorted(promised):
        found = read(path.with_name(shard))
        for names, trouble in (
            (promised[shard] - found.keys(), "the index promises tensors that the shard lacks"),
            (found.keys() - promised[shard], "the shard holds tensors that the index does not place there"),
        ):
            if names:
                raise UnsafeFileError(
                    f"{path.with_name(shard)}: {trouble}: {join_names(sorted(names))}; get both again"
                )
        shards.append(found)
    return MappedTensors.joined(shards, content, path.name)


def read_index(path: Path) -> Index:
    """What an index promises of shards that all lie beside it; raises as `read_shards`, before any is read."""
    if path.is_file() and path.stat().st_size > _MAX_INDEX_BYTES:
        raise UnsafeFileError(f"{path}: an index of {path.stat().st_size} bytes is none of a model; get it again")
    content = parse_object(bytes(map_file(path)), path, UnsafeFileError)
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    refuse_newer(metadata, path, WeightsError)
    shard_of = content.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UnsafeFileError(f"{path}: has no weight_map from names of tensors to files; get the index again")
    promised: dict[str, set[str]] = {}
    for name, shard in shard_of.items():
        promised.setdefault(shard, set()).add(name)
    suffix = shard_pattern(path.name).rpartition("*")[2]
    for shard in promised:
        # Also rejects other systems' paths; links are allowed, since model caches use them.
        if not shard.endswith(suffix) or any(character in shard for character in "/\\:\0"):
            raise UnsafeFileError(f"{path}: names the shard {shard!r}, which is no file beside it; nothing was read")
    missing = [shard for shard in sorted(promised) if not path.with_name(shard).is_file()]
    if missing:
        raise WeightsError(
            f"{path}: shards are missing beside it: {join_names(missing)}; get them, or the whole folder"
        )
    recorded = metadata.get(CONTENT)
    return Index(promised, recorded if isinstance(recorded, str) else None)
