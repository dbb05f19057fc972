"""Loads tokenizers by name, from files and folders, and saves them into folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rwkv_jax.atomic import new_file
from rwkv_jax.config import ConfigError
from rwkv_jax.data.text.files import explain_refusal
from rwkv_jax.data.tokenizers.base import Tokenizer
from rwkv_jax.data.tokenizers.byte_level import MAX_PADDING
from rwkv_jax.data.tokenizers.byte_values import ByteTokenizer
from rwkv_jax.data.tokenizers.hugging_face import HuggingFaceTokenizer
from rwkv_jax.data.tokenizers.longest_match import LongestMatchTokenizer
from rwkv_jax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from rwkv_jax.data.tokenizers.symbols import SymbolTokenizer
from rwkv_jax.data.tokenizers.word_piece import read_word_piece
from rwkv_jax.data.tokenizers.world import WorldTokenizer
from rwkv_jax.file_kinds import describe_wrong_file
from rwkv_jax.json_object import parse_object

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer.kind.json")
"""File names of saved tokenizers."""

_KINDS = (
    "a sentencepiece model, a Hugging Face tokenizer.json, a folder that holds a saved tokenizer, "
    "or one of the names world and bytes"
)
_MAX_BYTES = 2**27  # of a tokenizer's file; Gemma's has 33 million
_WORLD_TEXT = b"1 '\\x00' 1\n2 '\\x01' 1\n"  # of rwkv_vocab_v20230424.txt


def load_tokenizer(spec: str | os.PathLike[str], vocab_size: int | None) -> Tokenizer:
    """Loads the tokenizer that a config names and checks it against the model's vocabulary.

    Args:
      spec: a sentencepiece model, a Hugging Face tokenizer.json, or a folder written by `save_tokenizer`; or one of
        the names `world` and `bytes` (for files of these names, `./world` and `./bytes`). A file's kind is detected
        from its content.
      vocab_size: number of the model's ids; for `bytes` 256 or 257. None is for no model.

    Raises:
      ConfigError: the file is missing or of unknown kind, its package is not installed, or `fits_model` is False.
    """
    if spec == "world":
        tokenizer = WorldTokenizer()
    elif spec == "bytes":
        tokenizer = ByteTokenizer(256 if vocab_size == 256 else 257)
    else:
        path = Path(spec).expanduser()
        path = _find(path) if path.is_dir() else path
        content = _read(path)
        with explain_refusal(path, _KINDS, ("json", "sentencepiece", "text")):
            tokenizer = _of_content(content, path)
    if vocab_size is not None and not fits_model(tokenizer, vocab_size):
        raise ConfigError(
            f"tokenizer = {str(spec)!r}: does not match, it has {tokenizer.vocab_size} entries and the model has "
            f"vocab_size = {vocab_size}; name the model's own tokenizer; for a model that is yet to be trained, set "
            f"model.vocab_size to {tokenizer.vocab_size} or leave data.tokenizer unset to have one trained"
        )
    return tokenizer


def fits_model(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a model with `vocab_size` ids can use this tokenizer.

    The numbers must be equal, except for Hugging Face tokenizers: embeddings are padded for speed, for GPT-NeoX's 50277
    ids to 50304, 50432 or 50688. So a multiple of 64 that is less than 512 larger is accepted, too. A synthetic task's
    symbols fit any model with at least as many ids.
    """
    if isinstance(tokenizer, SymbolTokenizer):
        return tokenizer.vocab_size <= vocab_size
    if isinstance(tokenizer, HuggingFaceTokenizer | LongestMatchTokenizer) and vocab_size % 64 == 0:
        return 0 <= vocab_size - tokenizer.vocab_size <= MAX_PADDING
    return vocab_size == tokenizer.vocab_size


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> Path:
    """Saves a tokenizer atomically into a folder, from which `load_tokenizer` loads it.

    A given or trained file is written unchanged; of World and bytes only the name is saved.

    Returns:
      The file.

    Raises:
      ConfigError: the folder already contains another tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / tokenizer.saved.name
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if present == [target] and target.read_bytes() == tokenizer.saved.content:
        return target
    if present:
        raise ConfigError(f"{present[0]} is another tokenizer and is not overwritten; name another folder")
    with new_file(target) as file:
        file.write(tokenizer.saved.content)
    return target


def _find(folder: Path) -> Path:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise ConfigError(f"the folder {folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    if len(found) > 1:
        raise ConfigError(f"the folder {folder} holds {found[0].name} and {found[1].name}; name the file that is meant")
    return found[0]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        reason = describe_wrong_file(path, _KINDS) or f"cannot read it: {error.strerror}; give {_KINDS}"
        raise ConfigError(f"tokenizer = {str(path)!r}: {reason}") from error


def _of_content(content: bytes, path: Path) -> Tokenizer:
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, so it is no tokenizer; give {_KINDS}")
    if content.startswith(_WORLD_TEXT):
        raise ConfigError(f"{path} is the vocabulary of World as text; give the name world instead")
    if content.startswith(b"{"):
        try:
            record = parse_object(content, "it begins like JSON and is none", remedy="get it again")
        except ConfigError as error:
            raise ConfigError(f"{path} is damaged: {error}") from error
        if "kind" in record:
            return _of_kind(record, path)
        if "model" in record:
            if isinstance(record["model"], dict) and record["model"].get("type") == "WordPiece":
                return read_word_piece(record, content, str(path))
            return HuggingFaceTokenizer(content, str(path))
    elif content.startswith(b"\n"):  # the tag of a sentencepiece model's first field
        return SentencePieceTokenizer(content, str(path))
    raise ConfigError(f"{path} is a tokenizer of no known kind; give {_KINDS}")


def _of_kind(record: dict[str, Any], path: Path) -> Tokenizer:
    tokenizer: Tokenizer | None = None
    if record["kind"] == "world":
        tokenizer = WorldTokenizer()
    elif record["kind"] == "bytes" and type(record.get("vocab_size")) is int:
        tokenizer = ByteTokenizer(record["vocab_size"]) if record["vocab_size"] in ByteTokenizer.SIZES else None
    elif record["kind"] == "symbols" and _are_texts(record.get("symbols")):
        tokenizer = SymbolTokenizer(record["symbols"])
    if tokenizer is None or json.loads(tokenizer.saved.content) != record:
        raise ConfigError(f"{path} describes a tokenizer that this version does not have: {json.dumps(record)[:200]}")
    return tokenizer


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
