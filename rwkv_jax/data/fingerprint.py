"""What a run's data is recognized by when the run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any


def fingerprint_of(settings: Sequence[Any], parts: Iterable[bytes] = ()) -> str:
    """Hex digest of settings, which are what JSON has, and of the data that was made with them, in order."""
    digest = hashlib.blake2b(json.dumps(list(settings)).encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
