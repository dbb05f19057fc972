"""What stands beside token files, and what is said when they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.corpus import corpus_of_binidx
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.data.tokens import binidx
from rwkv_jax.data.tokens.binidx import Binidx, BinidxWriter, open_binidx
from rwkv_jax.data.tokens.digest_file import verify_whole


def _write(folder: Path) -> None:
    with BinidxWriter(folder / "x", 257) as writer:
        for document in ([1, 2, 256], [3, 256], [4, 5, 6, 256]):
            writer.write(document)
            writer.end_document()


def _open(folder: Path) -> Binidx:
    return open_binidx(folder / "x.bin", folder / "x.idx")


def test_tokens_are_those_that_were_written(tmp_path: Path) -> None:
    _write(tmp_path)
    corpus_of_binidx(_open(tmp_path), ByteTokenizer(), 0)
    assert verify_whole(_open(tmp_path))


@pytest.mark.parametrize(("name", "place"), [("x.bin", 2), ("x.idx", -8 * 3)])
def test_a_change_of_either_file_is_found(tmp_path: Path, name: str, place: int) -> None:
    _write(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1 if name == "x.bin" else 3  # a boundary of documents, which still rise
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"x\.bin: it or x\.idx has changed since x\.digest\.json was .* remove that file"
    ):
        corpus_of_binidx(_open(tmp_path), ByteTokenizer(), 0)
    (tmp_path / "x.digest.json").unlink()
    corpus_of_binidx(_open(tmp_path), ByteTokenizer(), 0)
    assert not verify_whole(_open(tmp_path))


def test_a_change_between_the_blocks_that_opening_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binidx, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(binidx, "_MAX_BLOCKS", 2)
    _write(tmp_path)
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[6] ^= 1
    (tmp_path / "x.bin").write_bytes(content)
    corpus_of_binidx(_open(tmp_path), ByteTokenizer(), 0)
    with pytest.raises(ConfigError, match="has changed since"):
        verify_whole(_open(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"fingerprint": 3}'])
def test_a_record_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path)
    (tmp_path / "x.digest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.digest\.json"):
        corpus_of_binidx(_open(tmp_path), ByteTokenizer(), 0)
