"""The implementations that a model's config may name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import rwkv_kernels
from rwkv_jax.checks import ConfigError, require
from rwkv_jax.config import ModelConfig
from rwkv_kernels.dispatch import Implementation, Problem


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


def refuse_unable(config: ModelConfig, problem: Problem, where: str) -> None:
    """Refuses a named implementation that cannot run there.

    Args:
      problem: of the operator in a step, on the device that is to run it.
      where: the device, for the message.

    Raises:
      ConfigError: with the reason, and the implementations that can.
    """
    for field, implementations in known_implementations(config).items():
        name = getattr(config, field)
        implementation = implementations.get(name) if isinstance(name, str) else name
        here = problem
        if field == "step_implementation":
            here = dataclasses.replace(problem, shape=(problem.shape[0], 1, *problem.shape[2:]))
        if implementation is None or (refusal := implementation.refuses(here)) is None:
            continue
        able = [name for name, other in implementations.items() if other.refuses(here) is None]
        given = f"'{name}'" if isinstance(name, str) else "the given one"
        raise ConfigError(
            f"model.{field} = {given}: cannot run on {where}: {refusal}; name {' or '.join(able)} there, or leave it "
            "out for the default"
        )
