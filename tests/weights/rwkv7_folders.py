"""Folders of a small RWKV-7 as the RWKV organization has them on the Hugging Face hub, by others' hands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.hub_rwkv7 import PREFIXES
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.safetensors import write_sharded_safetensors
from tests.weights.files import CONFIGS

SEVEN = CONFIGS["7"]

FIELDS: dict[str, Any] = {
    "architectures": ["Rwkv7ForCausalLM"],
    "model_type": "rwkv7",
    "vocab_size": 29,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "decay_low_rank_dim": 4,
    "a_low_rank_dim": 5,
    "v_low_rank_dim": 6,
    "gate_low_rank_dim": 7,
    "norm_eps": 1e-5,
    "norm_bias": True,
    "wkv_state_dtype": "float32",
    "wkv_implementation": "eager",
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}
"""A config.json of the model of these tests, written down by hand."""

CANDIDATE = {
    "architectures": ["RwkvForCausalLM"],
    "model_type": "rwkv",
    "architecture_version": "rwkv7",
    "vocab_size": 29,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "attention_hidden_size": 32,
    "head_size": 8,
    "intermediate_size": 48,
    "context_length": 4096,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
"""The same by the competing proposal."""


def zeros(config: ModelConfig = SEVEN, dtype: Any = np.float32) -> dict[str, NDArray]:
    """What writers of the layout make up for layer 0."""
    width, rank = config.width, config.value_rank
    assert rank is not None
    shapes: list[tuple[int, ...]] = [(1, 1, width), (width, rank), (rank, width)]
    return {name: np.zeros(shape, dtype) for name, shape in zip(UNUSED, shapes, strict=True)}


def foreign(official: dict[str, NDArray], prefix: str = PREFIXES[0]) -> dict[str, NDArray]:
    """The names of the layout."""
    return {name if name == "head.weight" else prefix + name: x for name, x in official.items()}


def write_folder(
    folder: Path,
    tensors: dict[str, NDArray],
    fields: dict[str, Any] | None = FIELDS,
    *,
    max_shard_bytes: int = 10**9,
) -> Path:
    """A folder as others write it: no metadata of ours."""
    write_sharded_safetensors(folder, tensors, max_shard_bytes, {"format": "pt"})
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields))
    return folder
