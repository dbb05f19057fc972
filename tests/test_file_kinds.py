"""Files that are not what was asked for are named by their first bytes, and right ones never are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_jax.file_kinds import Kind, describe_wrong_file
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors

WANTED = "a .pth or .safetensors file"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 382224136\n" % (b"4d" * 32)
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>\x15\0\0\0\0\x18\3"


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "1")
    return stream.getvalue()


def tarred(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


WRONG_EVERYWHERE = {
    "a Git LFS pointer": (POINTER, r"is a Git LFS pointer to 382,224,136 bytes, not the file itself; .*git lfs pull"),
    "a pointer from Windows": (POINTER.replace(b"\n", b"\r\n"), "is a Git LFS pointer to 382,224,136 bytes"),
    "half a pointer": (POINTER[:50], "is a Git LFS pointer, not"),
    "an error of the hub": (
        b'{"error":"Repository not found"}',
        r"is the error answer of a server \('{\"error\":\"Repository not found\"}'\); mend the address",
    ),
    "an error of GitHub": (b'{"message": "Not Found", "documentation_url": "https://x", "status": "404"}', "is the er"),
    "an error of S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is the error answer.*Denied"),
    "a web page": (
        b"\xef\xbb\xbf\n<!DOCTYPE html><html><head><title>Sign in</title>",
        r"is a web page \('Sign in'\), saved in place of the file; download the file itself",
    ),
    "a page without a title": (b"<HTML><p>404</p>", r"is a web page \('<HTML><p>404</p>'\)"),
    "nothing": (b"", "is empty: the download or copy did not finish; get it again"),
    "zeros": (bytes(10_000), "begins with 4096 zeros: the download or copy did not finish; get it again"),
    "a zip cut short": (zipped("x/data.pkl")[:-30], r"is cut short at \d+ bytes: the download"),
    "a table cut short": (b"PAR1\x15\0" + b"\xff" * 99, r"is cut short at 105 bytes"),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c\0", "is a 7z archive; unpack it and name what was in it"),
    "a tar": (tarred("x.txt"), "is a tar archive; unpack it"),
    "GGUF": (b"GGUF\3\0\0\0", f"is a GGUF file of llama.cpp; name {WANTED}"),
    "rwkv.cpp": (b"fmgg\x65\0\0\0", f"is a GGML file of rwkv.cpp; name {WANTED}"),
    "NumPy": (b"\x93NUMPY\1\0", f"is an array of NumPy .*; name {WANTED}"),
    "an image": (b"\x89PNG\r\n\x1a\n\0", rf"is an image \(PNG\); name {WANTED}"),
    "a photograph": (b"\xff\xd8\xff\xe0\0", r"is an image \(JPEG\)"),
    "a document": (b"%PDF-1.7\n", "is a PDF document"),
    "a program": (b"\x7fELF\2\1\1\0", "is a program"),
}

OF_A_KIND: dict[Kind, tuple[bytes, str]] = {
    "text": ("Entry not found, sagt der Bär".encode(), rf"is text \('Entry not found, sagt der Bär'\); name {WANTED}"),
    "json": (b'{"model_type": "rwkv"}', rf"is JSON \('.*'\); name {WANTED}"),
    "compressed": (gzip.compress(b"x" * 99), r"is compressed \(gzip\); unpack it and name what was in it"),
    "zip": (zipped("x/y.npy"), "is a zip archive; unpack it"),
    "torch": (zipped("x/data.pkl"), "is a file of tensors by torch.save; name"),
    "pickle": (b"\x80\2}q\0.", "is a pickle, which is a program and is not run; name"),
    "parquet": (b"PAR1\x15\0" + b"\xff" * 99 + b"PAR1", "is a Parquet table; name"),
    "sentencepiece": (SENTENCEPIECE, "is a sentencepiece tokenizer; name"),
    "tokens": (b"MMIDIDX\0\0\1\0", r"is the index \(\.idx\) of a corpus of tokens; name"),
    "html": (b"<html>", "is a web page"),
}


@pytest.mark.parametrize("name", WRONG_EVERYWHERE)
def test_what_nobody_wants_is_named(tmp_path: Path, name: str) -> None:
    content, message = WRONG_EVERYWHERE[name]
    (tmp_path / "x.jsonl").write_bytes(content)
    found = describe_wrong_file(tmp_path / "x.jsonl", WANTED, ("text", "json", "zip", "torch", "parquet", "compressed"))
    assert found is not None
    assert re.match(message, found), found
    assert len(found) < 200


@pytest.mark.parametrize("kind", OF_A_KIND)
def test_a_kind_is_right_for_those_who_read_it(tmp_path: Path, kind: Kind) -> None:
    content, message = OF_A_KIND[kind]
    (tmp_path / "x").write_bytes(content)
    found = describe_wrong_file(tmp_path / "x", WANTED)
    assert found is not None
    assert re.match(message, found), found
    if kind == "html":  # a page is one only under its own name: as anything else it is a download gone wrong
        (tmp_path / "x").rename(tmp_path / "x.html")
        assert describe_wrong_file(tmp_path / "x.html", WANTED) is None
    else:
        assert describe_wrong_file(tmp_path / "x", WANTED, {kind}) is None


@pytest.mark.parametrize("content", [bz2.compress(b"x"), lzma.compress(b"x"), b"\x28\xb5\x2f\xfd\0\0"], ids=repr)
def test_compressed_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert str(describe_wrong_file(tmp_path / "x", WANTED)).startswith("is compressed (")
    assert describe_wrong_file(tmp_path / "x", WANTED, ["compressed"]) is None


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF and PAR1 are formats; RIFF, too.",
        b"BZh is how bzip2 files begin",
        b'{"text": "an error"}\n{"text": "a message"}\n',
        b'{"error": "in a story", "text": "..."}',
        "naïve".encode() * 2000,
        b"PK means many things",
        b"[1] a footnote",
        b"\x00\x01\x02\x03" * 99,
        tarred("sys_info"),
    ],
    ids=repr,
)
def test_what_only_looks_like_it_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert describe_wrong_file(tmp_path / "x.txt", WANTED, ("text", "json", "pickle")) is None


@pytest.mark.parametrize("source", ["https://huggingface.co/a/b.pth", "s3://bucket/x", "file:///x"])
def test_a_url_is_no_path(source: str) -> None:
    for path in (source, Path(source)):
        found = describe_wrong_file(path, WANTED)
        assert found == f"is a web address, not a path; download it, then name {WANTED}"


def test_folders_and_what_is_not_there_are_the_callers_to_describe(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", "nul\0", "C:/x"):
        assert describe_wrong_file(path, WANTED) is None


def test_whole_weights_are_right_and_cut_ones_say_how_much_is_there(tmp_path: Path) -> None:
    tensors = {'"data_offsets":[0,999999]': np.zeros(300, np.float32), "w": np.ones((20, 30), np.float16)}
    write_torch_file(tmp_path / "a.pth", tensors)
    write_safetensors(tmp_path / "b.safetensors", tensors)
    for path in (tmp_path / "a.pth", tmp_path / "b.safetensors"):
        whole = path.read_bytes()
        assert describe_wrong_file(path, WANTED, ("torch", "safetensors")) is None
        for size in (20, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            found = str(describe_wrong_file(path, WANTED, ("torch", "safetensors")))
            assert found.startswith("is cut short"), found
            assert f"{size:,}" in found
            if path.suffix == ".safetensors" and size >= 500:
                assert f"of {len(whole):,} bytes" in found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", b"PK\3\4", b"\n\x01\n", b"\0" * 8 + b"{", b"{", b"<html>", POINTER]), rest=st.binary()
)
def test_nothing_raises(tmp_path: Path, start: bytes, rest: bytes) -> None:
    (tmp_path / "x").write_bytes(start + rest)
    found = describe_wrong_file(tmp_path / "x", WANTED)
    assert found is None or re.match(r"(is|begins) .+[;:] \w", found)


def test_json_as_deep_as_it_likes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"[" * 4000)
    assert describe_wrong_file(tmp_path / "x", WANTED, ["json"]) is None
    (tmp_path / "x").write_text(json.dumps({"error": "x" * 4000}))
    assert len(str(describe_wrong_file(tmp_path / "x", WANTED))) < 250
