"""RWKV in JAX: models, training, weights in and out, inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    # Imported when they are asked for, so that `rwkv_jax.config` can be read without loading JAX.
    if name in __all__:
        from rwkv_jax.weights import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
