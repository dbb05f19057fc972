"""A tokenized corpus: a folder with token files, tokenizer and held-out text, built once and verified when opened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv_jax.atomic import new_folder
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.encoding import encode_document
from rwkv_jax.data.text.sources import PYTHON_STDLIB, read_documents
from rwkv_jax.data.text.split import Document, choose_held_out, split_document
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, train_sentencepiece
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile
from rwkv_jax.json_object import is_unchanged, parse_object, with_digest

FORMAT_VERSION = 1
"""Format version, part of each folder's name; change it if the same source and config would give other files."""

_SIDES = ("train", "held_out")
_TOKENIZER_BYTES = 32 * 2**20  # of the training text; more does not improve the tokenizer
_SCANNED_BYTES = 8 * 2**20
_PROGRESS_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class _Survey:
    """Names, size and digest of all documents of a source, collected in one pass."""

    names: tuple[str, ...]
    num_bytes: int
    digest: str


def prepare_folder(data: DataConfig, vocab_size: int, report: Callable[[str], None]) -> Corpus:
    """Opens the corpus of a text source in `data.cache_dir`, or builds it there.

    The folder is named after the source and a digest of its documents, the held-out share, the vocabulary size and the
    tokenizer; it is created atomically, even if several processes build it at once. The source is read up to four
    times, one document in memory at a time. `report` gets lines to print, one of them the number of documents that do
    not survive a round trip through the tokenizer.
    Raises ConfigError for an invalid source, split or tokenizer, and for a damaged folder.
    """
    given = None if data.tokenizer is None else load_tokenizer(data.tokenizer, vocab_size)
    survey = _survey(data, read_documents(data, report))
    report(f"{data.source}: {len(survey.names)} documents, {survey.num_bytes / 1e6:.2f} MB")
    vocab_size = vocab_size if given is None else given.vocab_size  # the model may have more ids than the tokenizer
    folder = Path(data.cache_dir).expanduser() / _folder_name(data, vocab_size, survey, given)
    if not folder.exists():
        _build_folder(folder, data, vocab_size, survey, given, report)
    corpus = load_corpus(folder)
    for side, file in (("training", corpus.train), ("held-out", corpus.held_out)):
        if file is not None:
            report(
                f"{side}: {file.num_documents} documents, {file.num_bytes / 1e6:.3f} MB "
                f"({file.num_bytes / survey.num_bytes:.1%}), {file.num_tokens} tokens, "
                f"{file.bytes_per_token:.3f} bytes/token"
            )
    report(f"corpus {corpus.folder}, fingerprint {corpus.fingerprint}")
    return corpus


def load_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Opens a prepared corpus after checking every file against its recorded size and digest.

    Reads each file once, about a second per gigabyte. Raises ConfigError if the folder is missing or damaged, or if a
    token is not an id of the tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no corpus folder {folder}; prepare_corpus builds one")
    try:
        try:
            record = parse_object((folder / "corpus.json").read_bytes(), "its content")
        except ConfigError as error:
            raise _damage(folder, f"corpus.json cannot be understood ({error})") from error
        if record["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"corpus folder {folder} has format {record['format_version']}, this version reads {FORMAT_VERSION}; "
                "prepare it again from its source"
            )
        files: dict[str, dict[str, Any]] = record["files"]
        dtype, vocab_size = np.dtype(record["dtype"]), record["vocab_size"]
        for name, noted in files.items():
            found = (folder / name).stat().st_size
            if found != noted["size"]:
                raise _damage(folder, f"{name} has {found} bytes, not {noted['size']}")
        sides = [side for side in _SIDES if f"{side}.bin" in files]
        if "held_out" in sides and files["held_out.txt"]["size"] != record["held_out"]["num_bytes"]:
            raise _damage(folder, "held_out.txt is not as long as the held-out documents")
        for name, noted in files.items():
            digest, largest = _scan(folder / name, dtype if name.endswith(".bin") else np.dtype(np.uint8))
            if digest != noted["digest"]:
                raise _damage(folder, f"the content of {name} has changed")
            if name.endswith(".bin") and largest >= vocab_size:
                raise _damage(folder, f"{name} holds the token {largest}, but the vocabulary has {vocab_size}")
        tokenizer = load_tokenizer(folder, vocab_size)
        if tokenizer.fingerprint != record["tokenizer_fingerprint"]:
            raise _damage(folder, "its tokenizer is not the one that made the tokens")
        if not is_unchanged(record):
            raise _damage(folder, "the content of corpus.json has changed")
        opened = {
            side: TokenFile(
                path=folder / f"{side}.bin",
                tokens=np.memmap(folder / f"{side}.bin", dtype=dtype, mode="r"),
                num_bytes=record[side]["num_bytes"],
                num_documents=record[side]["num_documents"],
            )
            for side in sides
        }
        digests = "".join(files[f"{side}.bin"]["digest"] for side in sides)
        return Corpus(
            sources=(opened["train"],),
            shares=(1,),
            held_out=opened.get("held_out"),
            held_out_bytes=(folder / "held_out.txt").read_bytes if "held_out" in sides else bytes,
            tokenizer=tokenizer,
            fingerprint=hashlib.blake2b(digests.encode(), digest_size=16).hexdigest(),
            folder=folder,
        )
    except FileNotFoundError as error:
        raise _damage(folder, f"{Path(error.filename).name} is missing") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise _damage(folder, f"corpus.json cannot be understood ({error!r})") from error


def _damage(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"corpus folder {folder} is damaged: {what}; delete the folder, and it is built again")


def _survey(data: DataConfig, documents: Iterator[Document]) -> _Survey:
    names, num_bytes, digest = [], 0, hashlib.blake2b(digest_size=16)
    for document in documents:
        content = document.text.encode()
        names.append(document.name)
        num_bytes += len(content)
        name = document.name.encode("utf-8", "surrogateescape")
        # Length prefixes make the digest depend on where names and texts end.
        digest.update(f"{len(name)} {len(content)} ".encode() + name)
        digest.update(content)
    return _Survey(tuple(names), num_bytes, digest.hexdigest())


def _folder_name(data: DataConfig, vocab_size: int, survey: _Survey, given: Tokenizer | None) -> str:
    tokenizer = "trained" if given is None else given.fingerprint
    identity = json.dumps([FORMAT_VERSION, survey.digest, data.held_out, vocab_size, tokenizer])
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    stem = data.source if data.source == PYTHON_STDLIB else Path(data.source).expanduser().resolve().stem
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:64]
    return f"{readable or 'corpus'}-{digest}"


def _sides(data: DataConfig, survey: _Survey) -> Iterator[tuple[str, Document]]:
    if data.held_out == 0:
        yield from (("train", document) for document in read_documents(data))
        return
    if len(survey.names) == 1:
        for document in read_documents(data):
            yield from zip(_SIDES, split_document(document, data.held_out), strict=True)
        return
    held_out = choose_held_out(survey.names, data.held_out)
    for document in read_documents(data):
        yield ("held_out" if document.name in held_out else "train"), document


def _build_folder(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    survey: _Survey,
    given: Tokenizer | None,
    report: Callable[[str], None],
) -> None:
    # Another process may be faster; it builds the same files from the same source.
    with new_folder(folder, label=f"data.cache_dir = {data.cache_dir!r}", exist_ok=True) as temporary:
        if given is None:
            started = time.monotonic()
            texts = (document.text for side, document in _sides(data, survey) if side == "train")
            stride = -(-survey.num_bytes // _TOKENIZER_BYTES)
            train_sentencepiece(texts, vocab_size, temporary / "tokenizer.model", stride)
            report(f"trained a tokenizer of {vocab_size} entries in {time.monotonic() - started:.1f} s")
            tokenizer = load_tokenizer(temporary, vocab_size)
        else:
            save_tokenizer(given, temporary)
            tokenizer = given
        started = time.monotonic()
        record = _write_sides(temporary, data, survey, tokenizer, report)
        report(f"tokenized {survey.num_bytes / 1e6:.2f} MB in {time.monotonic() - started:.1f} s")
        (temporary / "corpus.json").write_text(json.dumps(with_digest(record), indent=2) + "\n", encoding="utf-8")


def _write_sides(
    folder: Path, data: DataConfig, survey: _Survey, tokenizer: Tokenizer, report: Callable[[str], None]
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32).newbyteorder("<")
    sides = _SIDES if data.held_out > 0 else ("train",)
    counts = {side: {"num_bytes": 0, "num_documents": 0} for side in sides}
    done = reported = changed = 0
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {side: stack.enter_context((folder / f"{side}.bin").open("wb")) for side in sides}
        texts = {side: stack.enter_context((folder / f"{side}.txt").open("wb")) for side in sides if side != "train"}

        def write(side: str, tokens: list[int]) -> None:
            files[side].write(np.array(tokens, dtype).tobytes())

        for side in sides:
            write(side, [tokenizer.end_of_text])
        for side, document in _sides(data, survey):
            changed += not encode_document(tokenizer, document, functools.partial(write, side))
            write(side, [tokenizer.end_of_text])
            content = document.text.encode()
            if side in texts:
                texts[side].write(content)
            counts[side]["num_bytes"] += len(content)
            counts[side]["num_documents"] += 1
            done += len(content)
            if done - reported >= _PROGRESS_BYTES:
                reported = done
                report(f"tokenized {done / 1e6:.0f} of {survey.num_bytes / 1e6:.0f} MB")
    if _survey(data, read_documents(data)) != survey:
        raise ConfigError(f"data.source = {data.source!r}: changed while it was read; start again")
    if changed:
        total = sum(count["num_documents"] for count in counts.values())
        report(f"the tokenizer changes the text of {changed} of {total} documents, as by normalization")
    return {
        "format_version": FORMAT_VERSION,
        "source": data.source,
        "source_digest": survey.digest,
        "share_held_out": data.held_out,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **counts,
        "files": {
            name: {"size": (folder / name).stat().st_size, "digest": _scan(folder / name, np.dtype(np.uint8))[0]}
            for name in (*(f"{side}.bin" for side in sides), *(f"{side}.txt" for side in texts), tokenizer.saved.name)
        },
    }


def _scan(path: Path, dtype: np.dtype[Any]) -> tuple[str, int]:
    """The digest of a file and the largest token in it."""
    digest, largest = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while content := file.read(_SCANNED_BYTES):
            digest.update(content)
            if dtype.itemsize > 1:
                largest = max(largest, int(np.frombuffer(content, dtype).max()))
    return digest.hexdigest(), largest
