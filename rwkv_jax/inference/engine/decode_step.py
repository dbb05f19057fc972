"""Whether a kernel does a decoded token's work in the heads of a layer: where it is right, and faster than XLA's form.

That is measured once for each device, model size and number of rows, and kept with the other measurements
(docs/autotune.md).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import jax

import rwkv_kernels
from rwkv_jax import autotune
from rwkv_jax.autotune import measure
from rwkv_jax.config import ModelConfig
from rwkv_kernels.autotune import Workload


def choose_step(config: ModelConfig, platform: str, batch_sizes: Sequence[int]) -> str | None:
    """The implementation of `wkv7_step` that an engine decodes with; None is the model's own equations.

    It is one that is the fastest of those that are right at the smallest and at the largest batch size.

    Args:
      platform: of the model's device.
      batch_sizes: of the decode programs, ascending.
    """
    chosen = set()
    for rows in dict.fromkeys((batch_sizes[0], batch_sizes[-1])):
        workload = autotune.decoding_workload(config, rows)
        if workload is None or config.step_implementation is not None or platform != workload.problem.platform:
            return None
        chosen.add(_fastest(workload))
    name = chosen.pop()
    return None if chosen else name


@functools.cache
def _fastest(workload: Workload) -> str | None:
    """The fastest implementation that is right; None is the definition, and is taken where nothing else can run."""
    step = rwkv_kernels.PARTS[workload.operator]
    definition, *others = step.implementations
    if all(step.implementations[name].refuses(workload.problem) for name in others):
        return None
    try:
        tuning = autotune.find_or_measure(workload, measure)
    except jax.errors.JaxRuntimeError as error:  # such as no memory beside the model for what is measured
        warnings.warn(f"{workload.operator} is not measured: {error}", stacklevel=3)
        return None
    return None if tuning.chosen == definition else tuning.chosen
