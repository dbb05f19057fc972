"""Files of models of gigabytes that take no room on the disk: their numbers are holes, which read as zeros."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from tests.weights.forged import memory, state, tensor, text

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")


def sparse_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes bfloat16 tensors."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + at)


def sparse_pth(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes bfloat16 tensors, without checksums of their entries, as torch can be told to."""
    items = b""
    for key, (name, shape) in enumerate(shapes.items()):
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        held = memory(str(key), ("torch", "BFloat16Storage"), math.prod(shape))
        items += text(name) + tensor(held, shape=shape, strides=strides)
    pickled = state(items)
    sizes = {f"x/data/{key}": 2 * math.prod(shape) for key, shape in enumerate(shapes.values())}
    entries = {"x/data.pkl": (len(pickled), zlib.crc32(pickled))} | {name: (size, 0) for name, size in sizes.items()}
    directory = b""
    with path.open("wb") as file:
        for name, (size, checksum) in entries.items():
            own = name.encode()
            told = (checksum, size, size, len(own))
            directory += _CENTRAL.pack(b"PK\1\2", 0, 0, 0, 0, 0, 0, *told, 0, 0, 0, 0, 0, file.tell()) + own
            file.write(_LOCAL.pack(b"PK\3\4", 0, 0, 0, 0, 0, *told, 0) + own)
            if name.endswith(".pkl"):
                file.write(pickled)
            else:
                file.seek(size, 1)
        at = file.tell()
        file.write(directory + _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), at, 0))
