"""Official token files, byte for byte, and what is said about those that are none."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokens import binidx as binidx_module
from rwkv_jax.data.tokens.binidx import (
    Binidx,
    BinidxWriter,
    evenly_spaced_blocks,
    find_binidx,
    fingerprint,
    open_binidx,
)
from tests.data.corpora import idx_bytes, write_pair

_DOCUMENTS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]


def _open(stem: Path) -> Binidx:
    return open_binidx(stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx"))


def _write(target: Path, documents: list[list[int]], vocab_size: int = 65536) -> BinidxWriter:
    with BinidxWriter(target, vocab_size) as writer:
        for document in documents:
            writer.write(document[:1])  # a document may come in parts
            writer.write(document[1:])
            writer.end_document()
    return writer


def official_get(idx: bytes, content: bytes, offset: int, length: int) -> list[int]:
    """What the official reader's get(idx=0, offset, length) gives, written out from its description."""
    assert idx[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", idx[9:17])
    (code,) = struct.unpack("<B", idx[17:18])
    count, boundaries = struct.unpack("<QQ", idx[18:34])
    assert version == 1
    kind = {4: "<i4", 8: "<u2"}[code]
    pointers = np.frombuffer(idx, "<i8", count=count, offset=34 + 4 * count)
    assert len(idx) == 34 + 12 * count + 8 * boundaries
    start = int(pointers[0]) + offset * np.dtype(kind).itemsize
    return np.frombuffer(content, kind, count=length, offset=start).tolist()


def test_the_bytes_are_the_official_ones(tmp_path: Path) -> None:
    writer = _write(tmp_path / "x", _DOCUMENTS)
    assert (writer.num_tokens, writer.num_documents) == (9, 3)
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<9H", 5, 6, 0, 7, 0, 8, 9, 10, 0)
    by_hand = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    by_hand += struct.pack("<3i", 3, 2, 4) + struct.pack("<3q", 0, 6, 10) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == by_hand == idx_bytes([3, 2, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.digest.json", "x.idx"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 70000), max_size=6), min_size=1, max_size=12), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], wide: bool
) -> None:
    vocab_size = 70001 if wide else 65536
    documents = [[min(token, vocab_size - 1) for token in document] + [0] for document in documents]
    stem = tmp_path_factory.mktemp("pair") / "x"
    _write(stem, documents, vocab_size)
    opened, flat = _open(stem), [token for document in documents for token in document]
    assert opened.tokens.dtype == (np.int32 if wide else np.uint16)
    assert opened.tokens.tolist() == flat
    assert opened.num_documents == len(documents)
    starts = [opened.document_start(document) for document in range(len(documents) + 1)]
    assert starts == [sum(map(len, documents[:count])) for count in range(len(documents) + 1)]
    idx, content = stem.with_name("x.idx").read_bytes(), stem.with_name("x.bin").read_bytes()
    assert official_get(idx, content, 1, len(flat) - 1) == flat[1:]


def test_indices_longer_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers and boundaries go on where the block before ended, in writing and in checking."""
    monkeypatch.setattr(binidx_module, "_BLOCK_ITEMS", 3)
    documents = [[1] * (1 + item % 4) for item in range(11)]
    _write(tmp_path / "x", documents)
    assert (tmp_path / "x.idx").read_bytes() == idx_bytes([len(document) for document in documents])
    assert _open(tmp_path / "x").num_documents == 11
    pointers = [0, 2, 6, 12, 20, 22, 26, 32, 40, 42, 44]
    (tmp_path / "x.idx").write_bytes(idx_bytes([len(document) for document in documents], pointers=pointers))
    with pytest.raises(ConfigError, match="item 10 begins at byte 44 and the items before it end at 46"):
        _open(tmp_path / "x")


@pytest.mark.parametrize("boundaries", [[0, 1, 4, 3, 5], [0, 1, 4, 4, 5, 6, 5]])
def test_boundaries_that_fall_from_one_block_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boundaries: list[int]
) -> None:
    monkeypatch.setattr(binidx_module, "_BLOCK_ITEMS", 3)
    write_pair(tmp_path / "x", [[1]] * 6)
    (tmp_path / "x.idx").write_bytes(idx_bytes([1] * 6, boundaries=boundaries))
    with pytest.raises(ConfigError, match="its document boundaries do not rise from 0 to at most its 6 items"):
        _open(tmp_path / "x")


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (6, "<f8"), (7, "<f8"), (8, "<u2")],
)
def test_every_dtype_code_is_read(tmp_path: Path, code: int, dtype: str) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS, dtype, code)
    opened = _open(tmp_path / "x")
    assert opened.tokens.dtype == np.dtype(dtype)
    assert opened.tokens.tolist() == [5, 6, 0, 7, 0, 8, 9, 10, 0]
    assert isinstance(opened.tokens, np.memmap)
    assert not opened.tokens.flags.writeable


def test_documents_of_several_items_and_without_a_last_boundary(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS)
    (tmp_path / "x.idx").write_bytes(idx_bytes([3, 2, 4], boundaries=[0, 2, 3]))
    opened = _open(tmp_path / "x")
    assert [opened.document_start(document) for document in range(opened.num_documents + 1)] == [0, 5, 9]
    (tmp_path / "x.idx").write_bytes(idx_bytes([3, 2, 4], boundaries=[0, 1]))
    opened = _open(tmp_path / "x")
    assert [opened.document_start(document) for document in range(opened.num_documents + 1)] == [0, 3, 9]


@pytest.mark.parametrize("name", ["x.v1.bin", "x.v1.idx", "x.v1"])
def test_a_pair_has_three_names(tmp_path: Path, name: str) -> None:
    write_pair(tmp_path / "x.v1", _DOCUMENTS)
    assert find_binidx(str(tmp_path / name)) == (tmp_path / "x.v1.bin", tmp_path / "x.v1.idx")


def test_what_is_no_pair(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS)
    assert find_binidx(str(tmp_path / "y")) is None
    assert find_binidx("python-stdlib") is None
    (tmp_path / "x").write_text("a text of the same name")
    assert find_binidx(str(tmp_path / "x")) is None
    (tmp_path / "x.idx").unlink()
    for name in ("x.bin", "x.idx"):
        with pytest.raises(ConfigError, match=r"there is no .*x\.idx; tokens need a \.bin and the \.idx beside it"):
            find_binidx(str(tmp_path / name))


_GOOD = idx_bytes([3, 2, 4])


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"", "is empty: the download or copy did not finish; get it again"),
        (b"\x01", "not a token index (.idx): starts with b'\\x01' instead of"),
        (idx_bytes([3, 2, 4], magic=b"MMIDIDX\x00\x01"), "not a token index (.idx): starts with b'MMIDIDX"),
        (_GOOD[:20], "is cut short, it ends within its header of 34 bytes; copy it again"),
        (idx_bytes([3, 2, 4], version=2), "has version 2 of the format, and only version 1 is known"),
        (idx_bytes([3, 2, 4], code=0), "has dtype code 0, and only 1 to 8 are known"),
        (idx_bytes([3, 2, 4], code=9), "has dtype code 9, and only 1 to 8 are known"),
        (_GOOD[:-1], "is cut short, it has 101 bytes and its header announces 102 (3 items, 4 document boundaries)"),
        (_GOOD + b"\x00", "is too long, it has 103 bytes and its header announces 102"),
        (_GOOD[:18] + struct.pack("<Q", 2**60) + _GOOD[26:], "is cut short, it has 102 bytes and its header announces"),
        (idx_bytes([]), "holds no documents (0 items"),
        (idx_bytes([3, 2, 4], boundaries=[]), "holds no documents"),
        (idx_bytes([3, -2, 8]), "item 1 has -2 tokens"),
        (idx_bytes([3, 2, 5]), "does not match x.bin, item 2 covers the bytes 10 to 20 of a file of 18"),
        (
            idx_bytes([3, 2, 4], pointers=[0, 6, 2**62]),
            f"does not match x.bin, item 2 covers the bytes {2**62} to {2**62 + 8} of a file of 18",
        ),
        (idx_bytes([3, 2, 4], pointers=[0, -2, 10]), "does not match x.bin, item 1 covers the bytes -2 to 2"),
        (idx_bytes([3, 2, 4], pointers=[0, 4, 10]), "item 1 begins at byte 4 and the items before it end at 6"),
        (idx_bytes([3, 2]), "does not match x.bin, its items have 10 bytes (5 tokens of 2) and the file has 18"),
        (idx_bytes([3, 2, 4], code=1), "item 1 begins at byte 6 and the items before it end at 3"),
        (idx_bytes([3, 2, 4], boundaries=[1, 2, 3]), "its document boundaries do not rise from 0 to at most its 3"),
        (idx_bytes([3, 2, 4], boundaries=[0, 2, 1]), "its document boundaries do not rise from 0"),
        (idx_bytes([3, 2, 4], boundaries=[0, 2, 4]), "its document boundaries do not rise from 0"),
    ],
)
def test_an_idx_that_is_wrong_is_named(tmp_path: Path, idx: bytes, message: str) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS)
    (tmp_path / "x.idx").write_bytes(idx)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        _open(tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / "x.idx"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no documents (3 items, 0 bytes in x.bin)"),
        (bytes(16), "does not match x.bin, item 2 covers the bytes 10 to 18 of a file of 16"),
        (bytes(17), "does not match x.bin, item 2 covers the bytes 10 to 18 of a file of 17"),
        (bytes(20), "its items have 18 bytes (9 tokens of 2) and the file has 20"),
    ],
)
def test_a_bin_of_another_length_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        _open(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", _DOCUMENTS).unlink()
    with pytest.raises(ConfigError, match=r"x\.bin: cannot be read \(No such file"):
        _open(tmp_path / "x")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    for name in ("x.bin", "x.digest.json", "x.idx"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ConfigError, match=rf"{name}: exists already and is not overwritten; move it away"):
            BinidxWriter(tmp_path / "x", 65536)
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.idx").symlink_to(tmp_path / "on a disk that is not there")
    with pytest.raises(ConfigError, match=r"x\.idx: exists already and is not overwritten"):
        BinidxWriter(tmp_path / "x", 65536)
    assert [path.name for path in tmp_path.iterdir()] == ["x.idx"]


def _write_and(target: Path, at_the_end: Callable[[], None]) -> None:
    with BinidxWriter(target, 65536) as writer:
        writer.write([1, 0])
        writer.end_document()
        assert not writer.paths[0].exists()
        at_the_end()


def test_nothing_that_came_meanwhile_is_overwritten(tmp_path: Path) -> None:
    def come() -> None:
        (tmp_path / "x.idx").write_text("precious")

    with pytest.raises(ConfigError, match=r"x\.idx: exists already and is not overwritten"):
        _write_and(tmp_path / "x", come)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["x.bin", "x.digest.json", "x.idx"])
def test_nothing_that_comes_at_the_very_end_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    link = os.link

    def link_too_late(temporary: Path, path: Path) -> None:
        if path.name == name:
            path.write_text("precious")
        link(temporary, path)

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: exists already and is not overwritten"):
        _write(tmp_path / "x", _DOCUMENTS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    _write(tmp_path / "x", _DOCUMENTS)
    assert _open(tmp_path / "x").num_documents == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.digest.json", "x.idx"]


def test_several_may_write_beside_each_other(tmp_path: Path) -> None:
    def write_another() -> None:
        _write(tmp_path / "x", _DOCUMENTS)

    with pytest.raises(ConfigError, match=r"x\.bin: exists already and is not overwritten"):
        _write_and(tmp_path / "x", write_another)
    assert _open(tmp_path / "x").num_documents == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.digest.json", "x.idx"]


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write_and(tmp_path / "folder" / "x.bin", interrupt)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_process_that_is_killed_leaves_no_files_of_these_names(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from rwkv_jax.data.tokens.binidx import BinidxWriter\n"
        "with BinidxWriter(Path(sys.argv[1]), 65536) as writer:\n"
        "    writer.write([1, 0])\n"
        "    writer.end_document()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(binidx_module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    _write(tmp_path / "x", _DOCUMENTS)
    assert _open(tmp_path / "x").num_documents == 3


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "there is no document to write"),
        ([[]], "there is no document to write"),
        ([[1, 0], [300, 0]], "document 1: token 300 is no id of a vocabulary of 300"),
        ([[-1]], "document 0: token -1 is no id of a vocabulary of 300"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _write(tmp_path / "x", documents, 300)
    assert list(tmp_path.iterdir()) == []


def test_a_document_without_an_end_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="the last document was not ended"),
        BinidxWriter(tmp_path / "x", 300) as writer,
    ):
        writer.write([1, 0])
    assert list(tmp_path.iterdir()) == []


def test_a_document_too_long_to_count_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binidx_module, "_MAX_ITEM_TOKENS", 5)
    _write(tmp_path / "x", [[1] * 5])
    with pytest.raises(ConfigError, match="document 1: 6 tokens are more than the format can count; divide it"):
        _write(tmp_path / "y", [[1] * 5, [1] * 6])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: cannot be written \(.*\); name another folder"):
        BinidxWriter(tmp_path / "file" / "x", 300)


def test_blocks_are_all_of_a_small_file_and_spread_over_a_large_one() -> None:
    assert list(evenly_spaced_blocks(5, 2)) == [slice(0, 5)]
    covered = list(evenly_spaced_blocks(2**25, 2))
    assert (len(covered), covered[0].start, covered[-1].stop) == (64, 0, 2**25)
    assert all(left.stop == right.start for left, right in itertools.pairwise(covered))
    spread = list(evenly_spaced_blocks(332115325534, 2))
    assert (len(spread), spread[0].start, spread[-1].stop) == (64, 0, 332115325534)
    assert {block.stop - block.start for block in spread} == {2**19}
    gaps = np.diff([block.start for block in spread])
    assert gaps.max() - gaps.min() <= 1


def test_the_fingerprint_is_that_of_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_path, found = write_pair(tmp_path / "x", _DOCUMENTS), set()
    found.add(fingerprint(_open(tmp_path / "x")))
    (tmp_path / "x.idx").write_bytes(idx_bytes([3, 2, 4], boundaries=[0, 1, 3]))
    found.add(fingerprint(_open(tmp_path / "x")))
    content = bytearray(bin_path.read_bytes())
    content[4] ^= 1
    bin_path.write_bytes(content)
    found.add(fingerprint(_open(tmp_path / "x")))
    assert len(found) == 3
    assert fingerprint(_open(tmp_path / "x")) in found
    # Beyond the blocks, nothing is read.
    monkeypatch.setattr(binidx_module, "_BLOCK_BYTES", 2)
    monkeypatch.setattr(binidx_module, "_MAX_BLOCKS", 2)
    sampled = fingerprint(_open(tmp_path / "x"))
    content[8] ^= 1
    bin_path.write_bytes(content)
    assert fingerprint(_open(tmp_path / "x")) == sampled
    content[-1] ^= 1
    bin_path.write_bytes(content)
    assert fingerprint(_open(tmp_path / "x")) != sampled
