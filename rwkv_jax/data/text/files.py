"""Reads text files, decompressed by suffix and decoded as UTF-8, or UTF-16 or UTF-32 with a byte order mark."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from rwkv_jax.config import ConfigError
from rwkv_jax.file_kinds import Kind, describe_wrong_file

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files, after the suffix of the content: a.jsonl.gz."""

# UTF-32 first: its mark starts with that of UTF-16. A UTF-8 mark is kept as a character of the text.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ZSTD_READ_BYTES = 2**13  # a frame of zeros expands a thousandfold
_ZSTD_MAX_WINDOW = 2**31  # `zstd --long` of up to 31
_SHOWN_BYTES = 8
_LOOKED_AT = 4096


class NotTextError(ConfigError):
    """A file that is not text in a supported encoding; the message has the remedy."""


def inner_suffix(name: str) -> str:
    """The suffix of a file name in lower case, without that of its compression."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def read_text(path: Path) -> str:
    """The text of a file, with line ends unchanged; only a byte order mark of UTF-16 or UTF-32 is removed.

    Raises:
      NotTextError: it is in another encoding or not text.
      ConfigError: it cannot be read or unpacked.
    """
    with _named(path), _open_bytes(path) as file:
        content = file.read()
    if content[257:262] == b"ustar":
        raise NotTextError(f"{path}: is a tar archive; unpack it, and name the file or folder that was in it")
    try:
        text = content.decode(_encoding(content[:4]))
    except UnicodeDecodeError as error:
        raise NotTextError(f"{path}: {_describe_bytes(content, error)}") from error
    if "\0" in text[:_LOOKED_AT] and (unmarked := _unmarked_encoding(content)):  # which may be valid UTF-8
        raise NotTextError(f"{path}: {unmarked}")
    return text


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a file as a text stream; lines end at "\\n" only. Bytes that are not UTF-8 become lone surrogates.

    Raises ConfigError, also while the stream is read, if the file cannot be read, decompressed or decoded.
    """
    with _named(path):
        with _open_bytes(path) as file:
            encoding = _encoding(file.read(4))
        errors = "surrogateescape" if encoding == "utf-8" else "strict"
        with _open_bytes(path) as file, io.TextIOWrapper(file, encoding, errors, newline="\n") as text:
            yield text


@contextlib.contextmanager
def explain_refusal(path: Path, wanted: str, reads: Collection[Kind] = ()) -> Iterator[None]:
    """Replaces a ConfigError raised in the block if `describe_wrong_file` knows what is wrong with the file."""
    try:
        yield
    except ConfigError as error:
        refuse_wrong_file(path, wanted, reads, error)
        raise


def refuse_wrong_file(
    path: Path, wanted: str, reads: Collection[Kind] = (), cause: BaseException | None = None
) -> None:
    """Raises ConfigError if `describe_wrong_file` knows that a file is of another kind."""
    is_compressed = path.suffix.lower() in COMPRESSED
    if wrong := describe_wrong_file(path, wanted, ("compressed",) if is_compressed else reads):
        raise ConfigError(f"{path}: {wrong}") from cause


class _ZstdFile(io.RawIOBase):
    """Decompresses zstd frames, one after the other; unlike the package's reader, it notices a truncated last frame."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f'{path}: needs the package zstandard: pip install "rwkv-jax[zstd]"') from error
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._packed or self._file.read(_ZSTD_READ_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_bytes(path: Path) -> Any:
    """Opens a file in binary mode, decompressed according to its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    return io.BufferedReader(_ZstdFile(path)) if suffix == ".zst" else path.open("rb")


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of reading and decompressing into ConfigError with the file and the remedy."""
    try:
        yield
    except UnicodeDecodeError as error:
        reason = f"does not go on in {error.encoding} as it begins ({error.reason}); get it again, or mend it"
        raise NotTextError(f"{path}: {reason}") from error
    except OSError as error:
        if error.errno is None:  # of what unpacks
            raise ConfigError(f"{path}: cannot be unpacked ({error}); get it again") from error
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: is cut short or damaged ({error}); get it again") from error


def _describe_bytes(content: bytes, error: UnicodeDecodeError) -> str:
    """Describes why bytes do not decode, with a remedy that does not corrupt them."""
    around = content[max(0, error.start - 2) : error.start + _SHOWN_BYTES]
    if error.encoding.startswith(("utf-16", "utf-32")):
        name = error.encoding[:6].upper()
        return f"begins as {name} and is none at byte {error.start} ({around!r}); get it again, or save it as UTF-8"
    if unmarked := _unmarked_encoding(content):
        return unmarked
    place = f"not UTF-8 at byte {error.start}"
    if b"\0" in content[:_LOOKED_AT]:
        return f"{place} and no text, it begins with {content[:_SHOWN_BYTES]!r}; leave it out"
    at_end = error.reason == "unexpected end of data"
    if not content[: error.start].isascii():
        if at_end:
            return f"{place}: it ends within a character; get it again"
        return (
            f"{place} ({around!r}), and UTF-8 before it; mend that place, or drop what cannot be read: "
            "iconv -c -f UTF-8 -t UTF-8"
        )
    remedy = "convert it from the encoding it was saved in: iconv -f ENCODING -t UTF-8"
    return f"{place}; {'get it again if it was cut short, or ' * at_end}{remedy} (there stands {around!r})"


def _unmarked_encoding(content: bytes) -> str | None:
    """The remedy for UTF-16 or UTF-32 without a byte order mark, recognized by zero bytes; None for other text."""
    for width, name in ((4, "UTF-32"), (2, "UTF-16")):
        count = len(content[:_LOOKED_AT]) // width
        for order, zeros in (("LE", range(1, width)), ("BE", range(width - 1))):
            if count > 1 and all(content[place : count * width : width].count(0) > 0.8 * count for place in zeros):
                return f"looks like {name} without its mark; convert it: iconv -f {name}{order} -t UTF-8"
    return None
