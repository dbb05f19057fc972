"""Reads safetensors files as memory-mapped views; writes them tensor by tensor, as one file or as shards.

What is written has a CRC-32 of each tensor in its metadata, and one of its header, under `checksums`; a model's files
also have what `content_hash` says.
"""

from __future__ import annotations

import functools
import io
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open

from rwkv_jax.atomic import new_file
from rwkv_jax.checks import is_whole
from rwkv_jax.json_object import parse_object
from rwkv_jax.weights.content_hash import (
    CONTENT,
    FORMAT,
    FORMAT_VERSION,
    ContentHash,
    content_sha256,
    refuse_newer,
    tensor_line,
)
from rwkv_jax.weights.fp8 import FLOAT8
from rwkv_jax.weights.shards import is_index, read_shards
from rwkv_jax.weights.tensors import (
    BFLOAT16,
    MappedTensors,
    Recorded,
    TensorSpec,
    UnsafeFileError,
    WeightsError,
    checksum_of,
    describe_wrong_weights,
    map_file,
    tensor_spec,
)

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": BFLOAT16,
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"  # the only header name that is not a tensor
_CHECKSUMS = "checksums"
_ALIGNMENT = 8  # of the first tensor; the largest element has as many bytes


def read_safetensors(path: Path) -> MappedTensors:
    """The tensors of one file, or of all shards of an index (`*.safetensors.index.json`), in the order of their bytes.

    Read-only views of memory maps, BF16 as `ml_dtypes.bfloat16`: nothing is read before it is used.

    Raises:
      WeightsError: a file is missing or cannot be read, is of a later version than is known, or a tensor is neither of
        BF16, F16, F32, F64, F8_E4M3, F8_E5M2 nor of integers.
      UnsafeFileError: a header that the safetensors library rejects, a shape that NumPy does not support, a duplicate
        name, or an index that leads out of its folder or does not match its shards.
    """
    return read_shards(path, _read_file) if is_index(path.name) else _read_file(path)


class Parsed(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, NDArray]
    """By name, in the order of their bytes."""
    metadata: dict[str, str]
    """Texts by name."""


def parse_safetensors(content: bytes, name: str) -> Parsed:
    """The tensors and metadata of a file's bytes; the tensors are read-only views of them.

    Args:
      name: what messages call it.

    Raises as `read_safetensors` does for one file.
    """
    try:
        deserialize(content)  # the library's checks, as of files
    except SafetensorError as error:
        raise UnsafeFileError(f"{name}: is not a whole safetensors file ({error}); get it again") from error
    header, start = _header(content, name)
    metadata = header.pop(_METADATA, None) or {}
    return Parsed(_views(content, name, header, start), metadata)


def safetensors_bytes(name: str, tensors: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of the file that `write_safetensors` writes; messages call it by the name. Raises as it does."""
    content = io.BytesIO()
    _write_to(content, name, tensors, _plan(name, tensors), metadata)
    return content.getvalue()


def write_safetensors(
    path: Path, tensors: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None, *, is_model: bool = False
) -> None:
    """Writes one file atomically; the same tensors and metadata give the same bytes.

    Tensors of wider elements come first, so that all are aligned, otherwise in their given order. One is in memory at a
    time. Older versions of `transformers` want the metadata {"format": "pt"}. A model's file says its version and has a
    hash of all its tensors (`content_hash`).
    Raises WeightsError if the file exists, or for a dtype or name that the format does not have.
    """
    _write_file(path, tensors, _plan(path, tensors), metadata, is_model=is_model)


def write_sharded_safetensors(
    folder: Path,
    tensors: Mapping[str, NDArray],
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `model-00001-of-0000N.safetensors` and, last, their index; or `model.safetensors`, if all fits in one.

    They are a model's (`write_safetensors`). A shard has up to `max_shard_bytes` of tensors, or a single tensor that is
    larger. Returns what `read_safetensors`
    takes: the index or the one file. The folder is made if need be; a failure leaves none of these files behind.
    Raises WeightsError if the folder has a model already, and as `write_safetensors` does.
    """
    if max_shard_bytes < 1:
        raise WeightsError(f"max_shard_bytes = {max_shard_bytes}: must be 1 or more")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    for present in (single, index, *folder.glob("model-*-of-*.safetensors")):
        if present.exists():
            raise WeightsError(f"{present}: exists already and is not overwritten; name a folder without a model")
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in _plan(folder, tensors).items():
        if shards[-1] and sum(other.num_bytes for other in shards[-1].values()) + spec.num_bytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = spec
    if len(shards) == 1:
        _write_file(single, tensors, shards[0], metadata, is_model=True)
        return single
    paths = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    written: list[Path] = []
    lines: list[str] = []
    try:
        for path, shard in zip(paths, shards, strict=True):
            lines += _write_file(path, tensors, shard, metadata, is_model=True)
            written.append(path)
        content = {
            "metadata": {
                "total_size": sum(spec.num_bytes for shard in shards for spec in shard.values()),
                FORMAT: str(FORMAT_VERSION),
                CONTENT: content_sha256(lines),
            },
            "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
        }
        with new_file(index, WeightsError) as file:
            file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return index


def _read_file(path: Path) -> MappedTensors:
    mapped = map_file(path)
    try:
        # The library checks sizes, overlaps, gaps and limits of the format before any number is used.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        wrong = describe_wrong_weights(path, ("safetensors",))
        remedy = f": it {wrong}" if wrong else "; get it again"
        raise UnsafeFileError(f"{path}: is not a whole safetensors file ({error}){remedy}") from error
    header, start = _header(mapped, path)
    refuse_newer(header.get(_METADATA) or {}, path, WeightsError)
    checksums = _recorded(header)
    recorded = {}
    if _METADATA in checksums:
        recorded[f"the header of {path.name}"] = Recorded(_described(header), checksums[_METADATA])
    metadata = header.pop(_METADATA, None) or {}
    metadata.pop(_CHECKSUMS, None)
    metadata.pop(FORMAT, None)
    content = metadata.pop(CONTENT, None)
    tensors = _views(mapped, path, header, start)
    recorded |= {name: Recorded(tensors[name], checksums[name]) for name in tensors if name in checksums}

    @functools.cache
    def lines() -> list[str]:
        return [tensor_line(name, header[name]["dtype"], tensors[name]) for name in tensors]

    return MappedTensors(tensors, [mapped], recorded, metadata, contents=[ContentHash(path.name, content, lines)])


def _header(content: bytes | mmap.mmap, source: Path | str) -> tuple[dict[str, Any], int]:
    """The header of a file that the library has checked, and where the bytes of its tensors begin."""
    start = 8 + int.from_bytes(content[:8], "little")
    return parse_object(content[8:start], source, UnsafeFileError), start


def _views(content: bytes | mmap.mmap, source: Path | str, header: Mapping[str, Any], start: int) -> dict[str, NDArray]:
    """The tensors of a header without metadata, in the order of their bytes, as views."""
    tensors: dict[str, NDArray] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _DTYPES.get(entry["dtype"]) or FLOAT8.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"{source}: the tensor {name!r} has dtype {entry['dtype']}, which is not read; "
                f"convert it to one of {', '.join(_DTYPES)}"
            )
        try:
            tensors[name] = np.ndarray(entry["shape"], dtype, buffer=content, offset=start + entry["data_offsets"][0])
        except (ValueError, OverflowError) as error:  # 65 axes, or an empty shape of 0 times too much
            raise UnsafeFileError(f"{source}: the tensor {name!r} has no possible shape ({error})") from error
    return tensors


def _recorded(header: Mapping[str, Any]) -> dict[str, int]:
    """The checksums of a file by name; none if it has none that can be understood."""
    try:
        found = json.loads((header.get(_METADATA) or {}).get(_CHECKSUMS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {name: value for name, value in found.items() if is_whole(value)} if isinstance(found, dict) else {}


def _described(header: Mapping[str, Any]) -> NDArray:
    """The bytes that the header's checksum is of: all but the checksums."""
    metadata = {name: value for name, value in (header.get(_METADATA) or {}).items() if name != _CHECKSUMS}
    content = json.dumps({**header, _METADATA: metadata}, sort_keys=True, separators=(",", ":"))
    return np.frombuffer(content.encode(), np.uint8)


def _shown(checksums: Mapping[str, int]) -> str:
    """As JSON of a length that does not depend on the numbers, so that they may be written last."""
    return "{" + ", ".join(f"{json.dumps(name)}: {value:10}" for name, value in checksums.items()) + "}"


def _plan(source: Path | str, tensors: Mapping[str, NDArray]) -> dict[str, TensorSpec]:
    """Shape and little-endian dtype of each tensor, in the order in which they are written."""
    plan: dict[str, TensorSpec] = {}
    for name in tensors:
        shape, dtype = tensor_spec(tensors, name)
        plan[name] = TensorSpec(shape, dtype.newbyteorder("<"))
        if plan[name].dtype not in _DTYPE_NAMES:
            raise WeightsError(
                f"{source}: the tensor {name!r} has dtype {dtype}, which is not written; "
                f"convert it to one of {', '.join(map(str, _DTYPE_NAMES))}"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise WeightsError(f"{source}: the name {name!r} cannot be written as UTF-8; rename the tensor") from error
        if name == _METADATA:
            raise WeightsError(f"{source}: no tensor can be named {name!r}, the format keeps that name; rename it")
    # The format has no gaps, so the order alone aligns each tensor to its elements.
    return dict(sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize))


def _write_file(
    path: Path,
    tensors: Mapping[str, NDArray],
    plan: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None,
    *,
    is_model: bool,
) -> list[str]:
    """Returns the line of each tensor, by which its hash is known."""
    with new_file(path, WeightsError) as file:
        return _write_to(file, path, tensors, plan, metadata, is_model=is_model)


def _write_to(
    file: BinaryIO,
    source: Path | str,
    tensors: Mapping[str, NDArray],
    plan: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None,
    *,
    is_model: bool = False,
) -> list[str]:
    ours = dict(metadata or {})
    if is_model:
        ours |= {FORMAT: str(FORMAT_VERSION), CONTENT: content_sha256([])}  # of the length that it will have
    header: dict[str, Any] = {_METADATA: ours}
    offset = 0
    for name, spec in plan.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    checksums = dict.fromkeys(plan, 0) | {_METADATA: 0}
    is_own = _CHECKSUMS not in ours
    lines: list[str] = []
    file.write(_header_bytes(header, checksums if is_own else None))
    for name, spec in plan.items():
        checksums[name], line = _write_tensor(source, file, name, spec, tensors[name], is_model=is_model)
        lines += line
    if is_model:
        ours[CONTENT] = content_sha256(lines)
    checksums[_METADATA] = checksum_of(_described(header))
    file.seek(0)
    file.write(_header_bytes(header, checksums if is_own else None))
    return lines


def _header_bytes(header: dict[str, Any], checksums: Mapping[str, int] | None) -> bytes:
    metadata = header[_METADATA] | ({} if checksums is None else {_CHECKSUMS: _shown(checksums)})
    content = json.dumps({**header, _METADATA: dict(sorted(metadata.items()))}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _write_tensor(
    source: Path | str, file: BinaryIO, name: str, spec: TensorSpec, tensor: NDArray, *, is_model: bool
) -> tuple[int, list[str]]:
    """Returns its checksum, and its line if it is a model's."""
    if (tensor.shape, tensor.dtype.newbyteorder("<")) != spec:
        raise WeightsError(f"{source}: the tensor {name!r} changed while it was written; start again")
    content = np.ascontiguousarray(tensor, spec.dtype).reshape(spec.shape)  # contiguous ones have an axis at least
    file.write(content.reshape(-1).view(np.uint8).data)
    return checksum_of(content), [tensor_line(name, _DTYPE_NAMES[spec.dtype], content)] if is_model else []
