"""What safetensors of a model written here say of themselves: the version of their form and a hash of their tensors.

Both are in the metadata of every file, and in those of the index of several:

    rwkv_jax.format          "1". A file of a later version is refused, one without it is read as anybody's.
    rwkv_jax.content_sha256  SHA-256, in hex, of names, dtypes, shapes and numbers. It is that of a text with a line for
                             each tensor, sorted, [NAME,DTYPE,[SIZES],HASH] as JSON in ASCII without blanks, each ended
                             by a line feed: DTYPE as safetensors calls it, HASH the SHA-256 in hex of the bytes of the
                             numbers, little-endian, rows first.

So it depends neither on the order of the tensors, nor on other metadata, nor on how they are spread over files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError

FORMAT = "rwkv_jax.format"
CONTENT = "rwkv_jax.content_sha256"

FORMAT_VERSION = 1
"""The newest version that is read, and the one that is written."""

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SHOWN = 40  # characters of somebody's text in a message


class ContentHash(NamedTuple):
    """The hash that a file has of its tensors, and what it is the hash of."""

    place: str
    """The file's name."""
    recorded: str | None
    """None if the file has none."""
    lines: Callable[[], list[str]]
    """The line of each tensor; reads them all when it is called first."""


def hash_or_none(recorded: str | None) -> str | None:
    """What a file has recorded, if it is a hash; any other text is never shown, and the file fails when compared."""
    return recorded if recorded is not None and _HASH.fullmatch(recorded) else None


def tensor_line(name: str, dtype: str, content: NDArray) -> str:
    """The line of a tensor.

    Args:
      dtype: as safetensors calls it.
      content: the numbers, in little-endian order.
    """
    numbers = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    entry = [name, dtype, list(content.shape), hashlib.sha256(numbers.data).hexdigest()]
    return json.dumps(entry, separators=(",", ":")) + "\n"


def content_sha256(lines: Iterable[str]) -> str:
    """The hash of tensors by their lines, in any order."""
    return hashlib.sha256("".join(sorted(lines)).encode("ascii")).hexdigest()


def refuse_newer(metadata: Mapping[str, Any], place: object, error: type[ConfigError]) -> None:
    """Raises the error if metadata say that a file is of a later version than is read, or of none that can be."""
    version = metadata.get(FORMAT)
    if version is None:
        return
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise error(f"{place}: {FORMAT} is {ascii(version)[:_SHOWN]}, which is no version; get the file again")
    if int(version) > FORMAT_VERSION:
        raise error(
            f"{place}: was written by a later rwkv-jax, in version {version} of its form, of which this one reads up "
            f"to {FORMAT_VERSION}; install a newer rwkv-jax, or have the file written again by this one"
        )
