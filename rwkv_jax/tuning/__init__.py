"""Fine-tuning below the trainer: adapters in memory and in files, merging them, models with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.tuning.adapter import Adapter, AdapterError
    from rwkv_jax.tuning.files import open_adapter, save_adapter
    from rwkv_jax.tuning.merge import merge_weights
    from rwkv_jax.tuning.pretrained import from_pretrained

__all__ = ["Adapter", "AdapterError", "from_pretrained", "merge_weights", "open_adapter", "save_adapter"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter": ("Adapter", "AdapterError"),
        "files": ("open_adapter", "save_adapter"),
        "merge": ("merge_weights",),
        "pretrained": ("from_pretrained",),
    },
)
