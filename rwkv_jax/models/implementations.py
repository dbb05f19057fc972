"""The implementations that a model's config may name."""

from __future__ import annotations

from collections.abc import Mapping

import rwkv_kernels
from rwkv_jax.checks import require
from rwkv_jax.config import ModelConfig
from rwkv_kernels.dispatch import Implementation


def known_implementations(config: ModelConfig) -> dict[str, Mapping[str, Implementation]]:
    """Those of each field that names one, by name; without the fields that the generation does not have."""
    parts = {"output_implementation": "wkv7_output", "step_implementation": "wkv7_step"}
    known = {
        field: rwkv_kernels.PARTS[part].implementations
        for field, part in parts.items()
        if field in config.spec.own_fields
    }
    if (operator := config.spec.operator) is not None:
        known["wkv_implementation"] = rwkv_kernels.OPERATORS[operator].implementations
    return known


def check_implementations(config: ModelConfig) -> None:
    """Refuses a name that no implementation has.

    Raises:
      ConfigError: with the names that there are.
    """
    for field, implementations in known_implementations(config).items():
        name = getattr(config, field)
        known = not isinstance(name, str) or name in implementations
        require(known, f"model.{field}", name, f"must be {', '.join(implementations)}, or None for the default")
