"""The zip that a .pth file is: which of its bytes are which entry.

Only zips as torch writes them are read: uncompressed, unencrypted, of one disk and in one folder. Nothing that the
file says is trusted before it is checked: the directory and each entry's own header must say the same, and entries must
lie within the file and apart from each other. So each byte has one meaning at most, no two programs see two different
files in one, and none claims more than the file holds. Of the contents only `byteorder` is looked at, and checksums
are not compared.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from typing import NoReturn

from rwkv_jax.checks import shown
from rwkv_jax.weights.pth.rejection import AGAIN, reject

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_LISTED = struct.Struct("<4s6H3I5H2I")
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""What stands before an entry's name, extra fields and content."""
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_SIZES_FOLLOW, _NAME_IS_UTF8 = 0x8, 0x800

_MAX_DIRECTORY_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Positions in the file (of the entry's own header, its content, and what comes next) and the checksum."""

    header: int
    start: int
    stop: int
    end: int
    checksum: int
    """CRC-32 of its content, by the directory."""

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return self.stop - self.start


def read_entries(mapped: mmap.mmap) -> dict[str, Entry]:
    """The entries of a .pth file by their names within the one folder that all are in; `data.pkl` is among them.

    Raises:
      UnsafeFileError: the file is no zip as torch writes them.
    """
    if mapped[:4] != b"PK\3\4":
        _reject_format(mapped)
    directory, stop, count = _directory(mapped)
    position = directory
    entries: dict[str, Entry] = {}
    for _ in range(count):
        if position + _LISTED.size > stop:
            reject("the zip's directory ends within an entry", AGAIN)
        listed = _LISTED.unpack_from(mapped, position)
        signature, _, _, flags, method, _, _, checksum, packed, size, *lengths, disk, _, _, header = listed
        if signature != b"PK\1\2":
            reject("the zip's directory is not a list of entries", AGAIN)
        position += _LISTED.size
        end = position + sum(lengths)
        if end > stop:
            reject("the zip's directory ends within an entry", AGAIN)
        raw, extra = mapped[position : position + lengths[0]], mapped[position + lengths[0] : end - lengths[2]]
        position = end
        name = _checked_name(raw)
        if name in entries:
            reject(f"the zip has two entries named {shown(name)}")
        if name.split("/")[1:2] in (["constants.pkl"], ["code"]):
            reject(
                "is a TorchScript archive, which holds a program",
                "where torch is installed: torch.save(torch.jit.load(old).state_dict(), new)",
            )
        if flags & ~(_SIZES_FOLLOW | _NAME_IS_UTF8):
            reject(f"the zip's entry {shown(name)} is encrypted or otherwise unusual (flags {flags:#x})")
        if method:
            reject(f"the zip's entry {shown(name)} is compressed, which torch never does (a zip bomb, perhaps)")
        size, packed, header = _with_zip64(name, extra, [size, packed, header])
        if packed != size:
            reject(f"the zip's entry {shown(name)} has {packed} bytes and claims {size}")
        if disk:
            reject(f"the zip's entry {shown(name)} is on another disk: the zip is one part of several")
        entries[name] = _located(mapped, name, raw, flags, checksum, size, header)
    if position != stop:
        reject("the zip's directory is longer than its entries", AGAIN)
    _check_overlaps(entries, directory)
    return _within_folder(mapped, entries)


def _reject_format(mapped: mmap.mmap) -> NoReturn:
    if (mapped[:1] == b"\x80" and mapped[1:2] <= b"\5") or mapped[257:262] == b"ustar":
        reject(
            "is in the format of torch before 1.6, a bare pickle or tar, which only unpickling can read",
            "where torch is installed: torch.save(torch.load(old, weights_only=True), new)",
        )
    reject("is not a zip by torch.save", "name a .pth file of torch 1.6 or later")


def _directory(mapped: mmap.mmap) -> tuple[int, int, int]:
    """Where the directory starts and stops, and how many entries it lists."""
    end = len(mapped) - _END.size
    if end < 0 or mapped[end : end + 4] != b"PK\5\6":
        reject("does not end as a zip does", AGAIN)
    _, disk, first_disk, *fields, comment = _END.unpack_from(mapped, end)
    stop, disks = end, [disk, first_disk]
    locator = end - _LOCATOR64.size
    if locator >= 0 and mapped[locator : locator + 4] == b"PK\6\7":
        _, locator_disk, stop, num_disks = _LOCATOR64.unpack_from(mapped, locator)
        if stop != locator - _END64.size or mapped[stop : stop + 4] != b"PK\6\6":
            reject("the zip64 record is not where the zip says", AGAIN)
        _, size64, _, _, disk64, first_disk64, *fields64 = _END64.unpack_from(mapped, stop)
        limits = (_MAX16, _MAX16, _MAX32, _MAX32)
        if size64 != _END64.size - 12 or any(
            short not in (long, limit) for short, long, limit in zip(fields, fields64, limits, strict=True)
        ):
            reject("the zip64 record contradicts the zip's end", AGAIN)
        fields = fields64
        disks += [locator_disk, disk64, first_disk64, num_disks > 1]
    here, count, size, start = fields
    if any(disks) or here != count:
        reject("the zip is one part of several disks")
    if comment or start + size != stop:
        reject("the zip's directory is not where the zip says", AGAIN)
    if size > _MAX_DIRECTORY_BYTES or count * _LISTED.size > size:
        reject(f"the zip claims {count} entries in a directory of {size} bytes", AGAIN)
    return start, stop, count


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        reject("the zip has an entry whose name is not UTF-8")
    # No entry is ever written out under its name here, but two programs must not see two different files in one.
    if any(part in ("", ".", "..") for part in name.split("/")) or any(c in name for c in "\\\0"):
        reject(f"the zip has an entry whose name is not a plain path: {shown(name)}")
    return name


def _with_zip64(name: str, extra: bytes, fields: list[int]) -> list[int]:
    """[size, packed size, header position], taken from the zip64 field where they are too large for their own."""
    wide = [i for i, field in enumerate(fields) if field == _MAX32]
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        content = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1 and len(content) == 8 * len(wide):
            for i, (value,) in zip(wide, struct.iter_unpack("<Q", content), strict=True):
                fields[i] = value
            wide = []
    if wide or position != len(extra):
        reject(f"the zip64 field of entry {shown(name)} does not match it", AGAIN)
    return fields


def _located(mapped: mmap.mmap, name: str, raw: bytes, flags: int, checksum: int, size: int, header: int) -> Entry:
    """The entry, once its own header says what the directory says."""
    if header + LOCAL_HEADER.size > len(mapped):
        reject(f"the zip's entry {shown(name)} lies outside the file", AGAIN)
    local = LOCAL_HEADER.unpack_from(mapped, header)
    signature, _, local_flags, method, _, _, local_checksum, packed, local_size, name_length, extra_length = local
    middle = header + LOCAL_HEADER.size + name_length
    start = middle + extra_length
    if start + size > len(mapped):
        reject(f"the zip's entry {shown(name)} lies outside the file", AGAIN)
    follow = bool(flags & _SIZES_FOLLOW)
    if _MAX32 in (packed, local_size):
        local_size, packed = _with_zip64(name, mapped[middle:start], [local_size, packed])
    same = packed == local_size == size and local_checksum == checksum
    same = same or (follow and packed == local_size == local_checksum == 0)  # torch writes them behind the content
    described = 0
    if follow:
        forms = [struct.pack("<4sI2Q", b"PK\7\x08", checksum, size, size)]
        if size < _MAX32:
            forms.append(struct.pack("<4s3I", b"PK\7\x08", checksum, size, size))
        tail = mapped[start + size : start + size + 24]
        described = max(len(form) if tail.startswith(form) else 0 for form in forms)
        same = same and described > 0
    if (
        not same
        or signature != b"PK\3\4"
        or mapped[header + LOCAL_HEADER.size : middle] != raw
        or (local_flags, method) != (flags, 0)
    ):
        reject(f"the zip's directory and its entry {shown(name)} contradict each other", AGAIN)
    return Entry(header, start, start + size, start + size + described, checksum)


def _check_overlaps(entries: Mapping[str, Entry], directory: int) -> None:
    free = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].header):
        if entry.header < free or entry.end > directory:
            reject(f"the zip's entry {shown(name)} overlaps another or the directory")
        free = entry.end


def _within_folder(mapped: mmap.mmap, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1 or f"{min(folders)}/data.pkl" not in entries:
        reject(
            "is a zip, but not one of tensors by torch.save: there is no NAME/data.pkl",
            "unpack it and name the weights in it",
        )
    found = {name.partition("/")[2]: entry for name, entry in entries.items()}
    order = found.get("byteorder")
    if order is not None and mapped[order.start : min(order.stop, order.start + 16)] != b"little":
        reject("was saved on a big-endian machine (its byteorder is not 'little')")
    return found
