"""PATH.digest.json beside PATH.bin and PATH.idx: what the two must be, since their format has no room for it.

fingerprint    of `binidx.fingerprint`: all of the .idx, at most 64 MiB of the .bin; compared whenever they are opened
bytes, crc32   of the whole .bin, compared by `rwkv info`
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_jax.config import ConfigError
from rwkv_jax.json_object import parse_object

if TYPE_CHECKING:
    from rwkv_jax.data.tokens.binidx import Binidx

_BLOCK_TOKENS = 2**22


def digest_path(bin_path: Path) -> Path:
    """Its path."""
    return bin_path.with_name(f"{bin_path.stem}.digest.json")


def digest_content(fingerprint: str, num_bytes: int, checksum: int) -> bytes:
    """Its content, for a .bin of so many bytes with this CRC-32."""
    record = {"fingerprint": fingerprint, "bytes": num_bytes, "crc32": checksum}
    return (json.dumps(record) + "\n").encode()


def check_fingerprint(opened: Binidx, fingerprint: str) -> None:
    """Raises ConfigError if the files are not those that were written. Without a record they are taken as they are."""
    record = _read(opened)
    if record is not None and record.get("fingerprint") != fingerprint:
        raise _changed(opened)


def verify_whole(opened: Binidx) -> bool:
    """Compares the whole .bin with its checksum. Returns whether there is one; raises ConfigError if it differs."""
    record = _read(opened)
    if record is None:
        return False
    checksum, tokens = 0, opened.tokens
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        checksum = zlib.crc32(tokens[start : start + _BLOCK_TOKENS].tobytes(), checksum)
    if (record.get("bytes"), record.get("crc32")) != (tokens.nbytes, checksum):
        raise _changed(opened)
    return True


def _read(opened: Binidx) -> dict[str, Any] | None:
    path = digest_path(opened.bin_path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(content, path, remedy="get it again, or remove it to take the tokens as they are")


def _changed(opened: Binidx) -> ConfigError:
    path = digest_path(opened.bin_path)
    return ConfigError(
        f"{opened.bin_path}: it or {opened.idx_path.name} has changed since {path.name} was written; copy all "
        "three again, or, if they were to be changed, remove that file"
    )
