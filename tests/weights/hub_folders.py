"""Folders as the Hugging Face hub has of Llama and Qwen: config.json, and random tensors in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.hugging_face import read_hub_config
from rwkv_jax.weights.layout_rules import LLAMA_RULES
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "eos_token_id": 256,
}
LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 131072,
}


def hub_names(config: ModelConfig) -> dict[str, str]:
    """From our name of each tensor of a model to that of transformers."""
    rules = {official: rule.foreign for rule in LLAMA_RULES for official in rule.official}
    found = {}
    for name in official_shapes(config):
        _, layer, within = name.split(".", 2) if name.startswith("blocks.") else ("", "", name)
        found[name] = rules[f"blocks.{{}}.{within}" if layer else name].format(layer)
    return found


def random_tensors(config: ModelConfig, dtype: Any = np.float32) -> dict[str, NDArray]:
    """Under the names of transformers."""
    rng, names = np.random.default_rng(0), hub_names(config)
    found = {}
    for name, shape in official_shapes(config).items():
        x = rng.standard_normal(shape)
        x = 1 + 0.2 * x if ".ln" in name or name.startswith("ln") else x / np.sqrt(shape[-1])
        found[names[name]] = x.astype(dtype)
    return found


def write_hub_folder(
    folder: Path,
    fields: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
    max_bytes: int | None = None,
    change: Mapping[str, NDArray | None] | None = None,
) -> dict[str, NDArray]:
    """Writes a folder, and returns its tensors.

    Args:
      max_bytes: of a shard; None is one file.
      change: tensors to put in the place of, or beside, the random ones; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = random_tensors(read_hub_config(folder / "config.json"), dtype) | dict(change or {})
    written = {name: x for name, x in tensors.items() if x is not None}
    if max_bytes is None:
        write_safetensors(folder / "model.safetensors", written, {"format": "pt"})
    else:
        write_sharded_safetensors(folder, written, metadata={"format": "pt"}, max_shard_bytes=max_bytes)
    return written
