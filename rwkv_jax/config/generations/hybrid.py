"""A model with RWKV-7's time mixing in the place of attention, in all of its layers or in some.

A layer keeps its norms, its feed-forward network and its residual stream. A layer with attention has a cache as state,
one with time mixing a state of constant size, side by side in the state of a model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from rwkv_jax.checks import checker, is_whole
from rwkv_jax.config.generations.base import GenerationSpec, ResolvedSizes, StateArray
from rwkv_jax.config.generations.rwkv7 import RWKV7Spec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig
    from rwkv_jax.config.run import TrainConfig

HYBRID_KINDS = ATTENTION_LAYER, RWKV_LAYER = "attention", "rwkv"
"""Kinds of a hybrid's layers."""

_RWKV = RWKV7Spec()

TIME_MIX_FIELDS = (
    "decay_rank",
    "iclr_rank",
    "value_rank",
    "gate_rank",
    "negative_eigenvalues",
    "wkv_implementation",
    "output_implementation",
    "step_implementation",
)
"""Fields of the model that are those of its time mixing."""


@functools.cache
def time_mix_config(config: ModelConfig) -> ModelConfig:
    """The RWKV-7 whose time mixing the layers of a hybrid have."""
    own = {name: getattr(config, name) for name in TIME_MIX_FIELDS}
    sizes = {name: getattr(config, name) for name in ("vocab_size", "num_layers", "width", "head_dim", "dtype")}
    return type(config)(_RWKV.name, **sizes, **own)


@functools.cache
def attention_config(config: ModelConfig) -> ModelConfig:
    """The model whose attention, norms and feed-forward networks the layers of a hybrid have."""
    plain = {field.name: field.default for field in dataclasses.fields(config) if field.name in TIME_MIX_FIELDS}
    return dataclasses.replace(config, rwkv_layers=(), **plain)


class HybridSpec(GenerationSpec):
    """What a config with `rwkv_layers` says of itself, beside what its architecture does."""

    operator = _RWKV.operator
    has_official_names = False

    def __init__(self, base: GenerationSpec) -> None:
        self.base = base
        self.name, self.article = base.name, base.article
        self.model_class = base.model_class
        self.own_fields = (*base.own_fields, *(name for name in TIME_MIX_FIELDS if name in _RWKV.own_fields))

    @property
    def title(self) -> str:
        """Of both."""
        return f"{self.base.title}/{_RWKV.title} hybrid"

    def layer_kinds(self, config: ModelConfig) -> tuple[str, ...]:
        """Of each layer, one of HYBRID_KINDS."""
        own = config.rwkv_layers
        return tuple(RWKV_LAYER if layer in own else ATTENTION_LAYER for layer in range(config.num_layers))

    def check(self, config: ModelConfig) -> None:
        """Requires layers that there are, and what each of the two models requires."""
        check = checker(config, "model")
        layers = config.rwkv_layers
        check(
            all(map(is_whole, layers))
            and layers == tuple(sorted(set(layers)))
            and 0 <= layers[0] <= layers[-1] < config.num_layers,
            "rwkv_layers",
            f"must be layers from 0 to L - 1 = {config.num_layers - 1}, each once, in ascending order",
        )
        check(
            config.context_length is None or ATTENTION_LAYER in self.layer_kinds(config),
            "context_length",
            "no layer has attention, whose cache has a length; leave it out",
        )
        check(
            config.num_heads * config.head_dim == config.width,
            "rwkv_layers",
            f"time mixing has as many heads as fit the width, {config.width} / {config.head_dim}, and attention "
            f"{config.num_heads}; leave it out, or take a teacher whose heads add up to its width",
        )
        attention_config(config)  # which check themselves
        time_mix_config(config)

    def check_run(self, run: TrainConfig) -> None:
        """Without attention there is none of its limits."""
        if ATTENTION_LAYER in self.layer_kinds(run.model):
            self.base.check_run(run)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """Those of the architecture, and RWKV-7's ranks."""
        own, ranks = attention_config(config).sizes(), time_mix_config(config).sizes()
        return dataclasses.replace(
            own,
            decay_rank=ranks.decay_rank,
            iclr_rank=ranks.iclr_rank,
            value_rank=ranks.value_rank,
            gate_rank=ranks.gate_rank,
            context_length=own.context_length if ATTENTION_LAYER in self.layer_kinds(config) else 0,
        )

    def outer_parameters(self, config: ModelConfig) -> int:
        """Of the architecture."""
        return self.base.outer_parameters(attention_config(config))

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Of a layer with attention."""
        return self.base.matrix_parameters(attention_config(config), first=first)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Of a layer with attention."""
        return self.base.other_parameters(attention_config(config), first=first)

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Of a layer with attention."""
        return self.base.mixing_flops(attention_config(config), sequence_length)

    def layer_matrix_parameters(self, config: ModelConfig, layer: int) -> int:
        """With time mixing for attention in some layers."""
        own = self.matrix_parameters(config, first=layer == 0)
        if layer not in config.rwkv_layers:
            return own
        mixing = _RWKV.time_mix_matrices(time_mix_config(config), first=layer == 0)
        return own - self.base.attention_matrices(attention_config(config)) + mixing

    def layer_other_parameters(self, config: ModelConfig, layer: int) -> int:
        """With time mixing for attention in some layers."""
        own = self.other_parameters(config, first=layer == 0)
        if layer not in config.rwkv_layers:
            return own
        mixing = _RWKV.time_mix_vectors(time_mix_config(config), first=layer == 0)
        return own - self.base.attention_vectors(attention_config(config)) + mixing

    def layer_mixing_flops(self, config: ModelConfig, layer: int, sequence_length: int | None) -> int:
        """Of the recurrence or attention."""
        if layer in config.rwkv_layers:
            return _RWKV.mixing_flops(time_mix_config(config), sequence_length)
        return self.mixing_flops(config, sequence_length)

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Of one layer of each kind that there is: first the cache of attention."""
        kinds = self.layer_kinds(config)
        return (*(self._cache(config) if ATTENTION_LAYER in kinds else ()), *self._recurrence(config))

    def layer_state(self, config: ModelConfig, layer: int) -> tuple[StateArray, ...]:
        """The cache, or the state of the recurrence."""
        return self._recurrence(config) if layer in config.rwkv_layers else self._cache(config)

    def _cache(self, config: ModelConfig) -> tuple[StateArray, ...]:
        return self.base.state(attention_config(config))

    @staticmethod
    def _recurrence(config: ModelConfig) -> tuple[StateArray, ...]:
        shift, _, matrix = _RWKV.state(time_mix_config(config))
        return shift, matrix

    def num_operator_layers(self, config: ModelConfig) -> int:
        """Those with time mixing."""
        return len(config.rwkv_layers)

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """RWKV-7's."""
        return _RWKV.prefill_implementation(platform)


@functools.cache
def hybrid_of(base: GenerationSpec) -> HybridSpec:
    """The spec of hybrids of an architecture."""
    return HybridSpec(base)
