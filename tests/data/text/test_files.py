"""Compressed files and encodings: what is read, and what is said of everything else."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.files import NotTextError, inner_suffix, open_text, read_text

_TEXT = "one\r\ntwo\u2028 café\n" + "日本 \U0001f600\n" * 2000
_PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", _PACK)
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.txt{suffix}"
    half = len(_TEXT) // 2
    parts = [_PACK[suffix](part.encode()) for part in (_TEXT[:half], _TEXT[half:])]  # as `cat` joins two files
    path.write_bytes(b"".join(parts))
    assert read_text(path) == _TEXT
    with open_text(path) as file:
        assert file.readlines() == re.findall(r"[^\n]*\n", _TEXT)


@pytest.mark.parametrize("suffix", _PACK)
def test_a_download_that_is_cut_short_is_refused_and_not_read_in_part(tmp_path: Path, suffix: str) -> None:
    packed = _PACK[suffix](bytes(range(256)).hex().encode() * 999)
    for length in (len(packed) // 2, len(packed) - 1):
        path = tmp_path / f"x.txt{suffix}"
        path.write_bytes(packed[:length])
        with pytest.raises(ConfigError, match=rf"x.txt{suffix}: is cut short or damaged \(.*\); get it again"):
            read_text(path)


@pytest.mark.parametrize("suffix", _PACK)
def test_what_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"text\n" * 10)
    with pytest.raises(ConfigError, match=r"(cannot be unpacked|is cut short or damaged) \(.*\); get it again"):
        read_text(tmp_path / f"x{suffix}")


def test_the_missing_package_for_zstd_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zst").write_bytes(_PACK[".zst"](b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r'x.zst: needs the package zstandard: pip install "rwkv-jax\[zstd\]"'):
        read_text(tmp_path / "x.zst")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf16_and_utf32_are_read_by_their_marks(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x").write_bytes(("\ufeff" + _TEXT).encode(encoding))
    assert read_text(tmp_path / "x") == _TEXT
    with open_text(tmp_path / "x") as file:
        assert file.read() == _TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["plain letters, which are valid UTF-8 with NULs between", "mostly plain, one café"])
def test_without_their_marks_they_are_named_and_not_read_as_utf8(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "x").write_bytes(text.encode(encoding))
    with pytest.raises(
        NotTextError, match=rf"looks like {encoding[:6].upper()} .*: iconv -f {encoding.upper().replace('-', '-?', 2)}"
    ):
        read_text(tmp_path / "x")


def test_the_mark_of_utf8_stays_a_character(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(codecs.BOM_UTF8 + b"text")
    assert read_text(tmp_path / "x") == "\ufefftext"


def test_a_text_may_hold_zeros(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\0b, and more\0")
    assert read_text(tmp_path / "x") == "a\0b, and more\0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Japanese, Russian, French: no encoding is named that would make something of the bytes, but not the text.
        ("日本語".encode("shift-jis"), r"not UTF-8 at byte 0; convert it .* iconv -f ENCODING"),
        ("привет".encode("cp1251"), r"not UTF-8 at byte 0; convert it .* iconv -f ENCODING"),
        (b"caf\xe9 noir", r"not UTF-8 at byte 3; convert it .* iconv -f ENCODING .*af\\xe9"),
        ("café, and caf".encode() + b"\xe9 noir", r"and UTF-8 before it; mend that place, .* iconv -c -f UTF-8"),
        ("é, a café".encode()[:-1], "it ends within a character; get it again"),
        (b"caf\xe9", r"not UTF-8 at byte 3; get it again if it was cut short, or convert it .* iconv -f ENCODING"),
        (b"\x01\x00\xff\x00\x02\xfe\xff\xff\xff", r"no text, it begins with b'\\x01\\x00\\xff.*; leave it out"),
        (
            codecs.BOM_UTF16_LE + b"a\0b",
            r"begins as UTF-16 and is none at byte 4 .*; get it again, or save it",
        ),
        (codecs.BOM_UTF32_BE + b"\xff" * 4, r"begins as UTF-32 and is none at byte 4"),
    ],
)
def test_the_advice_fits_the_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(NotTextError, match=message) as caught:
        read_text(tmp_path / "x")
    assert "latin" not in str(caught.value).lower()


def test_archives_are_refused_even_where_their_bytes_are_text(tmp_path: Path) -> None:
    content = bytearray(1024)
    content[:5], content[257:262] = b"a.txt", b"ustar"
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(NotTextError, match="is a tar archive; unpack it"):
        read_text(tmp_path / "x.tar.gz")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.txt", ".txt"), ("a.JSONL", ".jsonl"), ("a.b.jsonl.gz", ".jsonl"), ("a.json.ZST", ".json"), ("a.gz", "")],
)
def test_what_is_in_a_compressed_file_is_in_its_name(name: str, suffix: str) -> None:
    assert inner_suffix(name) == suffix
