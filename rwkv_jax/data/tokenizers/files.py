"""Reads tokenizer files."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_jax.config import ConfigError
from rwkv_jax.file_kinds import describe_wrong_file

KINDS = (
    "a sentencepiece model, a Hugging Face tokenizer.json, a folder that holds a saved tokenizer, "
    "or one of the names world and bytes"
)
"""The ways to specify a tokenizer, for errors."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that a config names. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = describe_wrong_file(path, KINDS) or f"cannot read it: {error.strerror}; give {KINDS}"
        raise ConfigError(f"tokenizer = {str(path)!r}: {reason}") from error
