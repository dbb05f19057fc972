"""Puts an engine together: its arguments, the forms of its model, a scheduler of slots, programs and shapes."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray

from rwkv_jax.autotune import measured_prefill
from rwkv_jax.checks import ConfigError, shown
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.inference.engine.decode_step import choose_step
from rwkv_jax.inference.engine.options import EngineOptions
from rwkv_jax.inference.engine.product_form import choose_form, with_form
from rwkv_jax.inference.engine.programs import Programs
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.inference.engine.slot_arrays import Shapes, SlotArrays
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import prefill_implementation as choose_prefill
from rwkv_jax.models.decoding import with_implementation

SHORT_ROWS = 8
"""Prompts in a batched prefill."""


def check_arguments(model: object, tokenizer: object, options: object, mesh: object) -> None:
    """Raises ConfigError for arguments of an engine that are of other types, or do not belong together."""
    if not isinstance(model, LanguageModel) or not hasattr(tokenizer, "vocab_size"):
        raise ConfigError(
            f"Engine({type(model).__name__}, {type(tokenizer).__name__}): must be a model, and then its tokenizer"
        )
    size, vocab_size = cast(Tokenizer, tokenizer).vocab_size, model.config.vocab_size
    if not fits_model(cast(Tokenizer, tokenizer), vocab_size):
        raise ConfigError(f"tokenizer: it has {size} tokens where the model has {vocab_size}; use its own")
    for name, value, kind in (("options", options, EngineOptions), ("mesh", mesh, Mesh)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} = {shown(value)}: must be of the type {kind.__name__}, or None")
    if mesh is None and (count := len(_devices(model))) > 1:
        raise ConfigError(f"mesh = None: the model lies on {count} devices; give the mesh it was loaded with")


def with_choices(model: LanguageModel, options: EngineOptions, mesh: Mesh | None) -> LanguageModel:
    """The model, of separate layers, with what is fastest for single tokens and short prompts where it lies."""
    platform = _platform(model)
    implementation, _ = choose_prefill(model.config, platform)
    if implementation is not None:
        model = with_implementation(model, implementation)
    if options.tune == "auto":
        model = with_form(model, choose_form(model, platform))
    if _measures(options, mesh) and (step := choose_step(model.config, platform, options.sizes)) is not None:
        model = with_implementation(model, step=step)
    return model


def measured_implementation(model: LanguageModel, options: EngineOptions, mesh: Mesh | None) -> str | None:
    """What is fastest for long prompts by measurement; None takes the table's choice."""
    return measured_prefill(model.config, _platform(model)) if _measures(options, mesh) else None


def _measures(options: EngineOptions, mesh: Mesh | None) -> bool:
    """Whether kernels are measured: on one device; on a mesh XLA splits the arrays, which no kernel is prepared for."""
    return options.tune == "auto" and mesh is None


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


def _devices(model: LanguageModel) -> set[Any]:
    return jax.tree.leaves(nnx.state(model, nnx.Param))[0].devices()


def _platform(model: LanguageModel) -> str:
    return next(iter(_devices(model))).platform
