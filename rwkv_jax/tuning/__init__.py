"""Fine-tuning below the trainer: adapters and tuned states, in memory and in files, and models with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.tuning.adapter import Adapter, AdapterError
    from rwkv_jax.tuning.files import open_adapter, save_adapter
    from rwkv_jax.tuning.merge import merge_weights
    from rwkv_jax.tuning.pretrained import from_pretrained
    from rwkv_jax.tuning.pretrained_state import load_initial_state, open_tuned_state
    from rwkv_jax.tuning.state_files import TunedState, save_tuned_state

__all__ = [
    "Adapter",
    "AdapterError",
    "TunedState",
    "from_pretrained",
    "load_initial_state",
    "merge_weights",
    "open_adapter",
    "open_tuned_state",
    "save_adapter",
    "save_tuned_state",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter": ("Adapter", "AdapterError"),
        "files": ("open_adapter", "save_adapter"),
        "merge": ("merge_weights",),
        "pretrained": ("from_pretrained",),
        "pretrained_state": ("load_initial_state", "open_tuned_state"),
        "state_files": ("TunedState", "save_tuned_state"),
    },
)
