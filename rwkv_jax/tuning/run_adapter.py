"""The adapter that a run has trained, as one of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv_jax.checks import shown
from rwkv_jax.config import TrainConfig
from rwkv_jax.models.tuned import ADAPTER, adapted_matrices, at, trained_in_full
from rwkv_jax.run_folder import BASE, load_model, read_run_file
from rwkv_jax.tuning.adapter import Adapter, AdapterError, Parts, pissa_as_lora


def adapter_of(params: Any, config: TrainConfig, base_digest: str | None = None) -> Adapter:
    """The adapter of a tuning run.

    Args:
      params: the run's parameters, or what its checkpoints hold of them.
      base_digest: of the run's base.

    Raises:
      AdapterError: the run trains nothing that an adapter can have.
    """
    tuning, model = config.tuning, config.model
    parts: dict[str, Parts] = {}
    for path, matrix in adapted_matrices(tuning, model).items():
        arrays = {name: np.asarray(x) for name, x in at(params[ADAPTER], path).items()}
        for i, layer in enumerate(matrix.layers):
            if matrix.is_adapted[i]:
                own = {name: x[i] if path[0] == "blocks" else x for name, x in arrays.items()}
                if tuning.adapter == "pissa":
                    initial = {name: own.pop(f"init_{name}") for name in ("lora_A", "lora_B")}
                    own = pissa_as_lora(own, initial)
                parts[".".join(["blocks", str(layer), *path[1:]])] = own
    replaced: dict[str, Any] = {}
    for path in sorted(trained_in_full(tuning, model)):
        value = np.asarray(at(params, path))
        if path[0] == "blocks":
            replaced |= {".".join(["blocks", str(1 + i), *path[1:]]): x for i, x in enumerate(value)}
        else:
            folder = ("blocks", "0") if path[0] == "first_block" else path[:1]
            replaced[".".join([*folder, *path[1:]])] = value
    if not parts and not replaced:
        raise AdapterError(f"tuning = {shown(tuning)}: trains no adapter, so there is none to take")
    kind = "lora" if tuning.adapter in (None, "pissa") else tuning.adapter
    return Adapter(kind, parts, dict.fromkeys(parts, tuning.factor), replaced, base_digest)


def open_run_adapter(run_dir: Path) -> Adapter:
    """The adapter of a run's newest checkpoint.

    Raises:
      AdapterError: the run trains no adapter.
      ConfigError: as `load_model`.
    """
    loaded = load_model(run_dir, "newest")
    if not loaded.config.tuning.is_partial:
        raise AdapterError(f"adapter = {shown(str(run_dir))}: is a run that trains a whole model; name one with tuning")
    digest = read_run_file(run_dir)["identity"].get(BASE)
    return adapter_of(jax.device_get(loaded.params), loaded.config, digest)
