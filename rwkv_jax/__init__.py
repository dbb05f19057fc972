"""RWKV in JAX: models, training, weights in and out, inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_jax.config import ConfigError
    from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained

    __version__: str

__all__ = ["ConfigError", "__version__", "from_pretrained", "save_pretrained"]

_MODULES = {"ConfigError": "config", "from_pretrained": "weights.pretrained", "save_pretrained": "weights.pretrained"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for, so that `rwkv_jax.config` can be read without loading JAX.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("rwkv-jax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "0+unknown"
