"""Detects a file's kind from its first bytes, for errors about wrong files, such as failed downloads.

Standard library only, so that every reader of files can use it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

Kind = Literal[
    "compressed",
    "html",
    "json",
    "other",
    "parquet",
    "pickle",
    "safetensors",
    "sentencepiece",
    "text",
    "tokens",
    "torch",
    "zip",
]
"""Kinds of files: "tokens" is an .idx, "torch" a zip by `torch.save`, "other" what nothing here reads."""

RUN_FILE = "run.json"
"""Name of the file that makes a folder a run's."""

METRICS_FILE = "metrics.jsonl"
"""Name of the file with a run's metrics."""

_HEAD_BYTES = 4096
_ZIP_END_BYTES = 22 + 2**16  # a zip's last record and the longest comment after it
_MAX_HEADER_BYTES = 2**24  # of a safetensors file; ten times that of a model of 10,000 tensors
_SHOWN = 60  # characters of a text that an error quotes
_UNFINISHED = "the download or copy did not finish; get it again"
_UNPACK = "unpack it and name what was in it"

_URL = re.compile(r"(?:https?|ftp|s3|gs|hf|file):/", re.IGNORECASE)  # Path merges two slashes into one
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script")
_ERROR_KEYS = {"detail", "error", "errors", "message", "msg"}
_KEYS_BESIDE = {"code", "documentation_url", "path", "status", "statusCode", "success", "timestamp", "title", "type"}
_TORCH_ENTRY = re.compile(rb"[^/]+/(?:data\.pkl|\.?data/.+|\.format_version|byteorder|version)")
_OFFSETS = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d{1,18}\s*,\s*(\d{1,18})')

_STARTS: dict[bytes, tuple[Kind, str]] = {
    b"\x1f\x8b": ("compressed", "compressed (gzip)"),
    **{b"BZh%d1AY" % level: ("compressed", "compressed (bzip2)") for level in range(1, 10)},
    b"\xfd7zXZ\0": ("compressed", "compressed (xz)"),
    b"\x28\xb5\x2f\xfd": ("compressed", "compressed (zstd)"),
    b"\x04\x22\x4d\x18": ("other", "compressed (lz4)"),
    b"7z\xbc\xaf\x27\x1c": ("other", "a 7z archive"),
    b"Rar!\x1a\x07": ("other", "a RAR archive"),
    b"PAR1\x15": ("parquet", "a Parquet table"),
    b"ARROW1": ("parquet", "an Arrow table"),
    b"GGUF": ("other", "a GGUF file of llama.cpp"),
    b"lmgg": ("other", "a GGML file"),
    b"fmgg": ("other", "a GGML file of rwkv.cpp"),
    b"tjgg": ("other", "a GGJT file of llama.cpp"),
    b"\x89HDF\r\n": ("other", "an HDF5 file"),
    b"\x93NUMPY": ("other", "an array of NumPy (.npy)"),
    b"MMIDIDX\0": ("tokens", "the index (.idx) of a corpus of tokens"),
    b"\x89PNG": ("other", "an image (PNG)"),
    b"\xff\xd8\xff": ("other", "an image (JPEG)"),
    b"GIF8": ("other", "an image (GIF)"),
    b"RIFF": ("other", "a sound, video or image (RIFF)"),
    b"OggS": ("other", "a sound (Ogg)"),
    b"ID3": ("other", "a sound (MP3)"),
    b"\x7fELF": ("other", "a program (ELF)"),
    b"SQLite format 3\0": ("other", "a database of SQLite"),
}


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, possibly normalized by `Path`."""
    return _URL.match(os.fspath(path)) is not None


def describe_wrong_file(path: str | os.PathLike[str], wanted: str, reads: Collection[Kind] = ()) -> str | None:
    """Describes a file that is clearly not what the caller reads, with the remedy.

    Wrong for every caller are Git LFS pointers, web pages (unless named .html), server error responses, empty files,
    files that start with nothing but zeros, and truncated zips, safetensors and Parquet tables. Reads only the first
    kilobytes, the end of a zip and the header of safetensors.

    Call it before a reader that accepts any bytes (text), otherwise after the reader has rejected the file. Files
    without a format of their own, such as a .bin of tokens, may start like anything.

    Args:
      path: a file, or a URL given in place of a path.
      wanted: completes the remedy "name ...": "a .pth or .safetensors file of weights".
      reads: kinds that the caller accepts.

    Returns:
      "is a Git LFS pointer ...; fetch it: ...", to follow "PATH: ". None for unrecognized files, folders, and files
      that do not exist or cannot be read.
    """
    path = Path(path)
    try:
        if not path.exists():
            return f"is a web address, not a path; download it, then name {wanted}" if is_url(path) else None
        if not path.is_file():
            return None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD_BYTES)
            more = file.read(max(0, _safetensors_header(head) - len(head)))
            file.seek(max(0, size - _ZIP_END_BYTES))
            tail = file.read(_ZIP_END_BYTES) if head.startswith((b"PK\3\4", b"PAR1\x15")) else b""
    except (OSError, ValueError):  # ValueError: a path with NUL
        return None
    if broken := _describe_broken(head, head + more, tail, size):
        return broken
    kind, what = _recognize(head)
    if what is None or kind in reads or (kind == "html" and path.suffix.lower() in (".htm", ".html", ".xhtml")):
        return None
    if kind == "html":
        return f"is {what}, saved in place of the file; download the file itself (its raw or resolve link)"
    if kind == "compressed" or what.endswith("archive"):
        return f"is {what}; {_UNPACK}"
    return f"is {what}; name {wanted}"


def _describe_broken(head: bytes, header: bytes, tail: bytes, size: int) -> str | None:
    """Describes a failed download or copy, if recognized."""
    if not head:
        return f"is empty: {_UNFINISHED}"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zeros: {_UNFINISHED}"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        found = re.search(rb"^size (\d{1,18})\r?$", head, re.MULTILINE)
        of = f" to {int(found[1]):,} bytes" if found else ""
        return f"is a Git LFS pointer{of}, not the file itself; fetch it: git lfs pull"
    is_xml_error = head.startswith((b"<?xml", b"<Error")) and b"<Error>" in head
    if is_xml_error or (size <= _HEAD_BYTES and _is_json_error(head)):
        return f"is the error answer of a server ({_shown(head)}); mend the address or log in there, and get it again"
    if tail and not _is_whole(tail):
        return f"is cut short at {size:,} bytes: {_UNFINISHED}"
    if length := _safetensors_header(head):
        whole = length + max((int(end) for end in _OFFSETS.findall(header[:length])), default=0)
        if size < whole:
            return f"is cut short, {size:,} of {whole:,} bytes are there: {_UNFINISHED}"
    return None


def _recognize(head: bytes) -> tuple[Kind, str | None]:
    """The kind of a file and a description of it; None if not recognized."""
    if head.startswith(b"%PDF-"):
        return "other", "a PDF document"
    if _is_text(head):  # first, since a text may start with the letters of any format
        return _recognize_text(head.removeprefix(codecs.BOM_UTF8).lstrip())
    for start, recognized in _STARTS.items():
        if head.startswith(start):
            return recognized
    if head.startswith(b"PK\3\4"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        is_torch = _TORCH_ENTRY.fullmatch(first) is not None
        return ("torch", "a file of tensors by torch.save") if is_torch else ("zip", "a zip archive")
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return "pickle", "a pickle, which is a program and is not run"
    if head[257:262] == b"ustar":
        # Before 1.6, torch wrote tars, too.
        return (
            ("pickle", "a file of torch before 1.6") if head.startswith(b"sys_info\0") else ("other", "a tar archive")
        )
    if _safetensors_header(head):
        return "safetensors", "a file of tensors (safetensors)"
    if re.match(rb"\n[\x01-\x7f]\n[\x01-\x7f]", head) and b"\0" in head[:64]:
        return "sentencepiece", "a sentencepiece tokenizer"
    return "other", None


def _recognize_text(text: bytes) -> tuple[Kind, str]:
    if text.lower().startswith(_HTML):
        title = re.search(rb"<title[^>]*>([^<]+)", text, re.IGNORECASE)
        return "html", f"a web page ({_shown(title[1] if title else text)})"
    if re.match(rb'\{\s*["}]|\[\s*[\["{\d\]]', text):
        return "json", f"JSON ({_shown(text)})"
    return "text", f"text ({_shown(text)})"


def _safetensors_header(head: bytes) -> int:
    """End of the header that a safetensors file claims to have; 0 for other files."""
    length = int.from_bytes(head[:8], "little")
    return 8 + length if head[8:9] == b"{" and 2 <= length <= _MAX_HEADER_BYTES else 0


def _is_whole(tail: bytes) -> bool:
    """Whether a Parquet table or zip has a valid end."""
    last = tail.rfind(b"PK\5\6")
    comment = int.from_bytes(tail[last + 20 : last + 22], "little")
    return tail.endswith(b"PAR1") or (last >= 0 and len(tail) - last >= 22 + comment)


def _is_json_error(content: bytes) -> bool:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return False
    keys = record.keys() if isinstance(record, dict) else set()
    return bool(keys & _ERROR_KEYS) and keys <= _ERROR_KEYS | _KEYS_BESIDE


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return re.search(r"[\0-\x06\x0e-\x1a\x1c-\x1f]", text) is None


def _shown(content: bytes) -> str:
    text = " ".join(content[: 4 * _SHOWN].decode("utf-8", "replace").split())
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
