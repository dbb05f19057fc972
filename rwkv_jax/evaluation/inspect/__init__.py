"""Looks inside a model: what its states keep, for how long, and which tokens it reads.

    recordings = inspect.record(model, tokens)       # what every layer's operator read and gave
    inspect.half_lives(recordings).tokens            # by layer and channel
    inspect.attention_map(recordings[3])             # A [B, H, T, T], A @ v = the operator's output

Functions take a model of `from_pretrained` and token ids, and give NumPy arrays in NamedTuples, whose docstrings have
the shapes; `rwkv inspect` draws and prints them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.evaluation.inspect.attention import attention_map, attention_share, mean_distance
    from rwkv_jax.evaluation.inspect.decays import HalfLives, half_lives
    from rwkv_jax.evaluation.inspect.editing import edit_state, state_direction
    from rwkv_jax.evaluation.inspect.layers import Recording, record
    from rwkv_jax.evaluation.inspect.pictures import draw_attention, draw_half_lives, draw_states, draw_trace
    from rwkv_jax.evaluation.inspect.probes import Probe, Recall, fit_probe, recall_by_distance, state_features
    from rwkv_jax.evaluation.inspect.states import StateHistory, read_texts, state_history, state_matrices
    from rwkv_jax.evaluation.inspect.tracing import CausalTrace, causal_trace, corrupt, restored_probability

__all__ = [
    "CausalTrace",
    "HalfLives",
    "Probe",
    "Recall",
    "Recording",
    "StateHistory",
    "attention_map",
    "attention_share",
    "causal_trace",
    "corrupt",
    "draw_attention",
    "draw_half_lives",
    "draw_states",
    "draw_trace",
    "edit_state",
    "fit_probe",
    "half_lives",
    "mean_distance",
    "read_texts",
    "recall_by_distance",
    "record",
    "restored_probability",
    "state_direction",
    "state_features",
    "state_history",
    "state_matrices",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attention": ("attention_map", "attention_share", "mean_distance"),
        "decays": ("HalfLives", "half_lives"),
        "editing": ("edit_state", "state_direction"),
        "layers": ("Recording", "record"),
        "pictures": ("draw_attention", "draw_half_lives", "draw_states", "draw_trace"),
        "probes": ("Probe", "Recall", "fit_probe", "recall_by_distance", "state_features"),
        "states": ("StateHistory", "read_texts", "state_history", "state_matrices"),
        "tracing": ("CausalTrace", "causal_trace", "corrupt", "restored_probability"),
    },
)
