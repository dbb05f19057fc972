"""Files that look like a .pth of tensors and need not be what they say, put together step by step and entry by entry.

No pickler would write most of these pickles, and no zip library these zips. Where nothing else is given, all is true:
`torch_file()` is a file that is read.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

NUMBERS = np.arange(6, dtype=np.float32)


# Steps of a pickle


def text(value: str) -> bytes:
    """Puts text on the stack."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def named(module: str, attribute: str) -> bytes:
    """Puts a class or function on the stack."""
    return b"c" + f"{module}\n{attribute}\n".encode()


def integer(value: int) -> bytes:
    """Puts a whole number on the stack."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def integers(values: tuple[int, ...]) -> bytes:
    """Puts a tuple of whole numbers on the stack."""
    return b"(" + b"".join(map(integer, values)) + b"t"


HOOKS = named("collections", "OrderedDict") + b")R"
REBUILD = named("torch._utils", "_rebuild_tensor_v2")


def memory(key: str = "0", kind: tuple[str, str] = ("torch", "FloatStorage"), count: int = 6) -> bytes:
    """Puts the reference to an entry of the zip on the stack."""
    return b"(" + text("storage") + named(*kind) + text(key) + text("cpu") + integer(count) + b"tQ"


HELD = memory()


def tensor(
    held: bytes = HELD,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    tail: bytes = b"\x89" + HOOKS,
) -> bytes:
    """Puts a tensor on the stack."""
    return REBUILD + b"(" + held + integer(offset) + integers(shape) + integers(strides) + tail + b"tR"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    """Calls a function and puts what it returns on the stack."""
    return named(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def state(items: bytes) -> bytes:
    """The pickle of a dict whose keys and values `items` puts on the stack."""
    return b"\x80\x02}(" + items + b"u."


GOOD = text("w") + tensor()
_TRUE_PICKLE = state(GOOD)


# Zips


class Entry(NamedTuple):
    """One entry of a zip; where there is None, the truth is told."""

    name: str
    content: bytes = b""
    method: int = 0
    flags: int = 0
    claimed: int | None = None
    """Its size by the directory."""
    packed: int | None = None
    """Its packed size by the directory."""
    local_name: str | None = None
    local_claimed: int | None = None
    local_flags: int | None = None
    local_checksum: int | None = None
    behind: bytes = b""
    """What comes after its content."""
    extra: bytes = b""
    disk: int = 0
    at: int | None = None
    """Where it is by the directory."""


class End(NamedTuple):
    """The end of a zip."""

    count: int | None = None
    size: int | None = None
    start: int | None = None
    disk: int = 0
    before: bytes = b""
    comment: bytes = b""


TRUE_END = End()


def zipped(entries: list[Entry], end: End = TRUE_END) -> bytes:
    """A zip of these entries, which need not be what they say."""
    body, directory = b"", b""
    for entry in entries:
        claimed = len(entry.content) if entry.claimed is None else entry.claimed
        local = claimed if entry.local_claimed is None else entry.local_claimed
        name, local_name = entry.name.encode(), (entry.local_name or entry.name).encode()
        flags = entry.flags if entry.local_flags is None else entry.local_flags
        checksum = zlib.crc32(entry.content)
        local_checksum = checksum if entry.local_checksum is None else entry.local_checksum
        header = len(body) if entry.at is None else entry.at
        body += struct.pack("<4s5H", b"PK\3\4", 0, flags, entry.method, 0, 0)
        body += struct.pack("<3I2H", local_checksum, local, local, len(local_name), 0) + local_name
        body += entry.content + entry.behind
        directory += struct.pack("<4s6H", b"PK\1\2", 0, 0, entry.flags, entry.method, 0, 0)
        packed = claimed if entry.packed is None else entry.packed
        directory += struct.pack("<3I2H", checksum, packed, claimed, len(name), len(entry.extra))
        directory += struct.pack("<3H2I", 0, entry.disk, 0, 0, header) + name + entry.extra
    count = len(entries) if end.count is None else end.count
    size = len(directory) if end.size is None else end.size
    start = len(body) if end.start is None else end.start
    tail = struct.pack("<4s4H2IH", b"PK\5\6", end.disk, end.disk, count, count, size, start, len(end.comment))
    return body + directory + end.before + tail + end.comment


MEMORY = Entry("x/data/0", NUMBERS.tobytes())
"""What the tensor of `GOOD` refers to."""
_ORDER = Entry("x/byteorder", b"little")


def torch_file(pickled: bytes = _TRUE_PICKLE, *others: Entry, end: End = TRUE_END) -> bytes:
    """A file as torch writes them, but for its pickle and what else is given."""
    rest = [entry for entry in (_ORDER, MEMORY) if entry.name not in {other.name for other in others}]
    return zipped([Entry("x/data.pkl", pickled), *rest, *others], end)


def deflated(pickled: bytes) -> bytes:
    """A zip of this pickle and the true memory, compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", NUMBERS.tobytes())
    return stream.getvalue()


def sizes_behind(entry: Entry, code: str = "<4s3I") -> Entry:
    """The same entry as programs write it that learn its size last, torch among them."""
    size = len(entry.content)
    behind = struct.pack(code, b"PK\7\x08", zlib.crc32(entry.content), size, size)
    return entry._replace(flags=8, local_claimed=0, local_checksum=0, behind=behind)


def zip64_record(count: int, size: int, start: int, *, at: int | None = None, disks: int = 1) -> bytes:
    """The record of large zips and the pointer to it."""
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, size, start)
    return record + struct.pack("<4sIQI", b"PK\6\7", 0, start + size if at is None else at, disks)
