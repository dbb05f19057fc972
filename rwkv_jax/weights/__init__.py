"""Loading and saving weights: official files, other projects' layouts, our checkpoints; never executes file content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.weights.pretrained import convert, from_pretrained, save_pretrained
    from rwkv_jax.weights.tensors import UnsafeFileError, WeightsError

__all__ = ["UnsafeFileError", "WeightsError", "convert", "from_pretrained", "save_pretrained"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "pretrained": ("convert", "from_pretrained", "save_pretrained"),
        "tensors": ("UnsafeFileError", "WeightsError"),
    },
)
