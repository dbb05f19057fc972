"""How the reader of .pth files says no: what it found, and what to do about it."""

from __future__ import annotations

from typing import NoReturn

from rwkv_jax.weights.tensors import UnsafeFileError

AGAIN = "it is damaged or cut short: copy or download it again"
"""The remedy for files that no program writes."""
_ANEW = "save the plain state dict anew, by torch.save or as .safetensors"


def refuse(what: str, remedy: str = _ANEW) -> NoReturn:
    """Raises UnsafeFileError; who knows the path puts it before."""
    raise UnsafeFileError(f"{what}; {remedy}")


def shown(text: str) -> str:
    """Text of a stranger's for a message: quoted, and no longer than a line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
