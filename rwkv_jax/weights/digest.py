"""The digest of a model's numbers, by which an adapter or a state knows its base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.model_config import UNUSED


def weights_digest(tensors: Mapping[str, NDArray]) -> str:
    """SHA-256 in hex of a base's numbers under official names, as float32; reads every tensor once.

    It is the same for any file format, dtype and layout that holds these numbers unrounded. RWKV-7's unused tensors do
    not count.
    """
    lines = [f"{name} {content_digest(tensors[name])}\n" for name in tensors if name not in UNUSED]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def content_digest(x: NDArray) -> str:
    """Shape and digest of an array's numbers as float32, little-endian."""
    numbers = np.ascontiguousarray(x, "<f4").reshape(-1).view(np.uint8)
    return f"{list(x.shape)} {hashlib.sha256(numbers.data).hexdigest()}"
