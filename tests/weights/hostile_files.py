"""A table of files that pretend to be a .pth of tensors but for their pickle, and of what is said of them.

They are what broken disks leave, what attackers write and what other programs mean; `forged` has their parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.weights.forged import (
    GOOD,
    MEMORY,
    NUMBERS,
    TRUE_END,
    End,
    Entry,
    deflated,
    sizes_behind,
    state,
    torch_file,
    zip64_record,
    zipped,
)

_ZEROS = Entry("x/data/0", bytes(24))

FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "it is empty"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n" * 9, "is not a zip by torch.save"),
    "a program before the zip": (lambda: b"\x7fELF" + torch_file(), "is not a zip by torch.save"),
    "a bare pickle": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + state(GOOD), "before 1.6"),
    "a bare pickle of protocol 5": (lambda: b"\x80\5" + state(GOOD)[2:], "before 1.6"),
    "a pickle of no protocol": (lambda: b"\x80\xff" + bytes(300), "is not a zip by torch.save"),
    "numbers alone": (lambda: bytes(300), "is not a zip by torch.save"),
    "a tar": (lambda: b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(800), "before 1.6"),
    "a zip of other things": (lambda: zipped([Entry("x/y.npy", b"1")]), "no NAME/data.pkl"),
    "a zip of nothing": (lambda: zipped([]), "is not a zip by torch.save"),
    "two folders": (lambda: torch_file(state(GOOD), Entry("y/data.pkl", state(GOOD))), "no NAME/data.pkl"),
    "TorchScript": (lambda: torch_file(state(GOOD), Entry("x/constants.pkl")), "TorchScript"),
    "TorchScript's code": (lambda: torch_file(state(GOOD), Entry("x/code/a.py", method=8)), "TorchScript"),
    "big-endian": (lambda: torch_file(state(GOOD), Entry("x/byteorder", b"big")), "big-endian"),
    "little-endian or so": (lambda: torch_file(state(GOOD), Entry("x/byteorder", b"little" * 9)), "big-endian"),
    "a compressed zip": (lambda: deflated(state(GOOD)), "is compressed"),
    "a zip bomb": (lambda: deflated(bytes(20_000_000)), "is compressed"),
    "a zip bomb in disguise": (lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**31)), "outside the file"),
    "two sizes": (lambda: torch_file(state(GOOD), MEMORY._replace(packed=20)), "has 20 bytes and claims 24"),
    "an unknown method": (lambda: torch_file(state(GOOD), MEMORY._replace(method=99)), "is compressed"),
    "an encrypted entry": (lambda: torch_file(state(GOOD), MEMORY._replace(flags=1)), "encrypted"),
    "an entry encrypted in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_flags=1)),
        "contradict each other",
    ),
    "a name twice in the zip": (lambda: torch_file(state(GOOD), MEMORY, MEMORY), "two entries named 'x/data/0'"),
    "another name in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_name="x/data/1")),
        "contradict each other",
    ),
    "another size in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_claimed=20)),
        "contradict each other",
    ),
    "another checksum in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_checksum=0)),
        "contradict each other",
    ),
    "no size in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_claimed=0, local_checksum=0)),
        "contradict each other",
    ),
    "another size in its own words, and the true one behind": (
        lambda: torch_file(state(GOOD), sizes_behind(MEMORY)._replace(local_claimed=20)),
        "contradict each other",
    ),
    "another checksum behind": (
        lambda: torch_file(state(GOOD), sizes_behind(MEMORY)._replace(behind=sizes_behind(_ZEROS).behind)),
        "contradict each other",
    ),
    "sizes that never follow": (lambda: torch_file(state(GOOD), MEMORY._replace(flags=8)), "contradict each other"),
    "an absolute name": (lambda: torch_file(state(GOOD), Entry("/etc/passwd")), "not a plain path: '/etc/passwd'"),
    "a name with ..": (lambda: torch_file(state(GOOD), Entry("x/../../y")), "not a plain path"),
    "a name with a backslash": (lambda: torch_file(state(GOOD), Entry("x\\..\\y")), "not a plain path"),
    "a name with NUL": (lambda: torch_file(state(GOOD), Entry("x/data/0\0")), "not a plain path"),
    "a folder": (lambda: torch_file(state(GOOD), Entry("x/data/")), "not a plain path"),
    "no name": (lambda: torch_file(state(GOOD), Entry("")), "not a plain path: ''"),
    "a name that is not UTF-8": (lambda: torch_file().replace(b"x/data/0", b"x/data/\xff"), "not UTF-8"),
    "entries in one place": (
        lambda: torch_file(state(GOOD), MEMORY, MEMORY._replace(name="x/data/1", at=0)),
        "contradict",
    ),
    "an entry in another": (lambda: _inside_another(), "overlaps another"),
    "an entry over the directory": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=80)),
        "overlaps another or the directory",
    ),
    "an entry beyond the file": (lambda: torch_file(state(GOOD), MEMORY._replace(at=2**31)), "outside the file"),
    "more entries than there are": (lambda: torch_file(end=End(count=4)), "claims 4 entries|within an entry"),
    "more entries than there are, in longer ones": (
        lambda: torch_file(state(GOOD), MEMORY._replace(extra=b"FB\x28\0" + bytes(40)), end=End(count=4)),
        "directory ends within an entry",
    ),
    "a name beyond the directory": (lambda: _patched(b"PK\1\2", 28, b"\xff\0"), "directory ends within an entry"),
    "entries of another disk": (lambda: _patched(b"PK\5\6", 8, b"\2\0"), "several disks"),
    "far more entries than there are": (
        lambda: torch_file(end=End(count=60_000)),
        "claims 60000 entries in a directory of",
    ),
    "fewer entries than there are": (lambda: torch_file(end=End(count=2)), "longer than its entries"),
    "a directory elsewhere": (lambda: torch_file(end=End(start=0)), "directory is not where"),
    "a comment that is not there": (lambda: torch_file()[:-2] + b"\5\0", "directory is not where"),
    "a comment": (lambda: torch_file(end=End(comment=b"hello")), "does not end as a zip"),
    "several disks": (lambda: torch_file(end=End(disk=1)), "several disks"),
    "an entry of another disk": (lambda: torch_file(state(GOOD), MEMORY._replace(disk=1)), "several"),
    "more after the zip": (lambda: torch_file() + b"MZ", "does not end as a zip"),
    "something before its end": (lambda: torch_file(end=End(before=bytes(8))), "directory is not where"),
    "a zip64 record elsewhere": (
        lambda: torch_file(end=End(before=zip64_record(3, 1, 1, at=0))),
        "zip64 record is not where",
    ),
    "a zip64 record away from its pointer": (
        lambda: _with_record(lambda n, size, start: (n, size, start), between=bytes(8)),
        "zip64 record is not where",
    ),
    "a zip64 record of other bytes": (
        lambda: _with_record(lambda n, size, start: (n, size, start)).replace(b"PK\6\6", b"PK\6\5"),
        "zip64 record is not where",
    ),
    "a zip64 record of another length": (
        lambda: _with_record(lambda n, size, start: (n, size, start)).replace(b"PK\6\6\x2c", b"PK\6\6\x2d"),
        "record contradicts",
    ),
    "a zip64 record that lies": (
        lambda: _with_record(lambda n, size, start: (n + 1, size, start)),
        "record contradicts",
    ),
    "a huge zip64 directory": (
        lambda: _with_record(lambda n, size, start: (n, size, start), End(count=0xFFFF, size=0xFFFFFFFF), 2**62),
        "claims 4611686018427387904 entries",
    ),
    "zip64 disks": (lambda: _with_record(lambda n, size, start: (n, size, start), disks=2), "several disks"),
    "a size for zip64 without one": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**32 - 1)),
        "zip64 field .* does not match",
    ),
    "a zip64 size that lies": (
        lambda: torch_file(
            state(GOOD), MEMORY._replace(claimed=2**32 - 1, extra=struct.pack("<2H2Q", 1, 16, 2**63, 2**63))
        ),
        "outside the file",
    ),
    "a zip64 size cut short": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**32 - 1, extra=struct.pack("<2HQ", 1, 16, 24))),
        "zip64 field .* does not match",
    ),
    "extra fields beyond their end": (
        lambda: torch_file(state(GOOD), MEMORY._replace(extra=b"FB\xff\xff")),
        "does not match",
    ),
    "a directory of other bytes": (lambda: torch_file().replace(b"PK\1\2", b"PK\1\3"), "not a list of entries"),
    "a local header of other bytes": (lambda: b"PK\3\4" + torch_file()[4:].replace(b"PK\3\4", b"PK\3\5"), "contradict"),
    "cut in the middle": (lambda: torch_file()[:200], "does not end as a zip"),
    "cut at the end": (lambda: torch_file()[:-1], "does not end as a zip"),
    "its end within its start": (lambda: b"PK\3\4PK\5\6" + bytes(5), "does not end as a zip"),
    "its end alone": (lambda: torch_file()[-22:], "is not a zip"),
}
"""By name, a file and what the refusal says."""


def _inside_another() -> bytes:
    inner = zipped([Entry("x/data/1", bytes(4))])
    inner = inner[: inner.index(b"PK\1\2")]
    content = NUMBERS.tobytes() + inner
    at = zipped([Entry("x/data.pkl", state(GOOD)), Entry("x/data/0", content)]).index(inner)
    outer = zipped([Entry("x/data.pkl", state(GOOD)), Entry("x/data/0", content), Entry("x/data/1", bytes(4), at=at)])
    return outer


def _patched(signature: bytes, offset: int, content: bytes) -> bytes:
    """Other bytes in the last header that begins so."""
    true = torch_file()
    at = true.rindex(signature) + offset
    return true[:at] + content + true[at + len(content) :]


def _with_record(
    lie: Callable[[int, int, int], tuple[int, int, int]],
    end: End = TRUE_END,
    count: int = 3,
    disks: int = 1,
    between: bytes = b"",
) -> bytes:
    plain = torch_file()
    start = plain.index(b"PK\1\2")
    size = len(plain) - 22 - start
    claimed = lie(count, size, start)
    record = zip64_record(*claimed, at=start + size, disks=disks)
    pointer = record.index(b"PK\6\7")
    return torch_file(end=end._replace(before=record[:pointer] + between + record[pointer:]))
