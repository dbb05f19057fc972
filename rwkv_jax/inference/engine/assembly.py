"""Puts a scheduler together from its slots, programs and shapes."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.engine.programs import Programs
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.inference.engine.slot_arrays import Shapes, SlotArrays
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.models import LanguageModel

SHORT_ROWS = 8
"""Prompts in a batched prefill."""


def make_scheduler(
    model: LanguageModel,
    weights: NDArray[np.float32],
    options: EngineOptions,
    prefix_cache: PrefixCache | None,
    *,
    mesh: Mesh | None = None,
    prefill_implementation: str | None = None,
) -> Scheduler:
    """A scheduler with its slots and programs, of which nothing is compiled yet; arguments as those of `Programs`."""
    shapes = Shapes(
        options.sizes,
        options.prefill_length,
        options.short_prefill_length,
        # Rows split over devices are not moved.
        options.num_slots if mesh is not None else min(options.num_slots, SHORT_ROWS),
        always_batched=options.batch_invariant,
    )
    programs = Programs(model, options.num_slots, options.burst_length, weights, mesh, prefill_implementation)
    return Scheduler(
        SlotArrays(programs, shapes),
        shapes,
        max_queue=options.max_queue,
        prefix_cache=prefix_cache,
        min_prefix_tokens=options.min_prefix_tokens,
    )
