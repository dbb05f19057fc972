"""Errors of the reader of .pth files: what it found, and the remedy."""

from __future__ import annotations

from typing import NoReturn

from rwkv_jax.weights.tensors import UnsafeFileError

AGAIN = "it is damaged or cut short: copy or download it again"
"""The remedy for files that no program writes."""
_ANEW = "save the plain state dict anew, by torch.save or as .safetensors"


def reject(what: str, remedy: str = _ANEW) -> NoReturn:
    """Raises UnsafeFileError; the caller that knows the path puts it in front."""
    raise UnsafeFileError(f"{what}; {remedy}")
