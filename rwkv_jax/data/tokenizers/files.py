"""Reading and writing the files of tokenizers."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from rwkv_jax.config import ConfigError
from rwkv_jax.data.files import publish

KINDS = (
    "a sentencepiece model, a Hugging Face tokenizer.json, a folder that holds a saved tokenizer, "
    "or one of the names world and bytes"
)
"""What a tokenizer can be given as, for errors."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that a config names. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer = {str(path)!r}: cannot read it: {error.strerror}; give {KINDS}") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file, whole or not at all. Raises ConfigError if it is there already."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already and is not overwritten; move it away or name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
