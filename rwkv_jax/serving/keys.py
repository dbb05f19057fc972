"""API keys from a file; the name of a key is its tenant."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checks import ConfigError, shown

MIN_KEY_LENGTH = 16
"""Characters of a key: shorter ones can be guessed."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NEW_KEY = "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"


class ApiKeys:
    """The keys that may use a server. Only digests are kept in memory."""

    def __init__(self, digests: Sequence[tuple[bytes, str]]) -> None:
        """Args: digests: SHA-256 of each key, with its tenant; a tenant may have several keys."""
        self._digests = tuple(digests)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key; None for a key that is not known. How long it takes tells nothing of the keys."""
        digest = _sha256(key)
        found = None
        for known, tenant in self._digests:  # all of them, always
            if hmac.compare_digest(digest, known):
                found = tenant
        return found

    @property
    def tenants(self) -> frozenset[str]:
        """Names of all tenants."""
        return frozenset(tenant for _, tenant in self._digests)


def read_keys(path: str | os.PathLike[str]) -> tuple[ApiKeys, list[str]]:
    """Keys of a file, and warnings.

    A line is `NAME:KEY`, or `NAME:sha256:DIGEST` with the key's SHA-256 in hexadecimal. Empty lines and those that
    begin with # are comments. Several lines may have one name, so that a key can be replaced while both are valid.

    Raises:
      ConfigError: the file cannot be read, or a line is wrong; the message has its number, never its key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"api_keys = {str(path)!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_keys = {str(path)!r}: is not UTF-8") from error
    found: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        digest, tenant = _read_line(line, f"{path}, line {number}")
        if found.setdefault(digest, tenant) != tenant:
            raise ConfigError(f"{path}, line {number}: {tenant} has the key of {found[digest]}; {_NEW_KEY}")
    if not found:
        raise ConfigError(f"api_keys = {str(path)!r}: has no keys; a line is NAME:KEY, and {_NEW_KEY}")
    warnings = []
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.append(f"{path} may be read by other users (mode {mode:04o}); chmod 600 it")
    return ApiKeys(list(found.items())), warnings


def _read_line(line: str, place: str) -> tuple[bytes, str]:
    tenant, colon, key = line.partition(":")
    if not colon:
        raise ConfigError(f"{place}: must be NAME:KEY or NAME:sha256:DIGEST")
    if not _NAME.fullmatch(tenant):
        raise ConfigError(
            f"{place}: the name {shown(tenant)} must be letters, digits, dots, - and _, at most 64 characters"
        )
    if match := _DIGEST.fullmatch(key):
        return bytes.fromhex(match[1]), tenant
    if key.startswith("sha256:"):
        raise ConfigError(f"{place}: after sha256: there must be 64 hexadecimal digits in lower case")
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
        raise ConfigError(
            f"{place}: the key must be at least {MIN_KEY_LENGTH} ASCII characters without spaces; {_NEW_KEY}"
        )
    return _sha256(key), tenant


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
