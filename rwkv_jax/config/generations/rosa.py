"""RWKV-8's ROSA: lookups of the longest match (docs/rosa.md), in a model of them alone and beside RWKV-7's time mixing.

`8-rosa` is the language model of RWKV-LM's 260212_rosa1bitLM_L12.py and 260222_rosa4bitLM_L12.py, `7-rosa` that of its
251105_reverse_run.py. Neither is a released generation: of RWKV-8 only its pieces have been published.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from rwkv_jax.checks import checker
from rwkv_jax.config.generations.base import GenerationSpec, ResolvedSizes, Shapes, StateArray
from rwkv_jax.config.generations.rwkv7 import RWKV7Spec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig
    from rwkv_jax.config.run import TrainConfig

_FIELDS = ("rosa_bits", "rosa_window", "rosa_implementation")
_IN_LAYERS = "rosa.q.weight"
_TIME_MIX = "att.r_k"
_WINDOW = 1024


def _check(config: ModelConfig) -> None:
    check = checker(config, "model")
    bits = config.sizes().rosa_bits
    check(bits <= 8, "rosa_bits", "must be at most 8")
    check(config.width % bits == 0, "width", f"must be a multiple of model.rosa_bits = {bits}: channels of a symbol")


def _check_run(run: TrainConfig, title: str) -> None:
    check = checker(run)
    remedy = f"the lookups of {title} are not split over time; use parallel.data, fsdp or tensor"
    check(run.parallel.sequence == 1, "parallel.sequence", remedy)
    bits = run.model.sizes().rosa_bits
    check(
        run.model.width % (bits * run.parallel.tensor) == 0,
        "parallel.tensor",
        f"would cut symbols of model.rosa_bits = {bits} channels; {run.model.width // bits} symbols are split",
    )


def _matrices(config: ModelConfig) -> int:
    """Q, K, V, O."""
    return 4 * config.width**2


def _vectors(config: ModelConfig) -> int:
    """Their biases; blends of q, k, v; the numbers that answers choose; the norm before it."""
    return (4 + 3 + 1 + 2) * config.width


def _lookup_state(config: ModelConfig) -> tuple[StateArray, ...]:
    """Keys, values and lengths of matches of the last tokens, and the number of tokens."""
    sizes = config.sizes()
    shape, axes = (config.width // sizes.rosa_bits, sizes.rosa_window), ("heads", None)
    symbols = StateArray(shape, axes, "uint8")
    return symbols, symbols, StateArray(shape, axes, "int32"), StateArray((), (), "int32")


class RosaSpec(GenerationSpec):
    """A language model of ROSA and channel mixing alone."""

    name = "8-rosa"
    model_class = "rwkv_jax.models.rosa:Rosa"
    own_fields = (*_FIELDS, "unused_norms")
    fields_beside_tensors = ("rosa_bits",)
    operator = None
    has_heads = False

    @property
    def title(self) -> str:
        """A piece of RWKV-8."""
        return "RWKV-8 ROSA"

    def check(self, config: ModelConfig) -> None:
        """Whole symbols, and no operator."""
        _check(config)
        remedy = f"{self.a_title} has no WKV operator; leave it out"
        checker(config, "model")(config.wkv_implementation is None, "wkv_implementation", remedy)

    def check_run(self, run: TrainConfig) -> None:
        """Refuses meshes that split time or symbols."""
        _check_run(run, self.title)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C; 4 bits; the last 1024 tokens."""
        return ResolvedSizes(
            config.ffn_width or 4 * config.width,
            rosa_bits=config.rosa_bits or 4,
            rosa_window=config.rosa_window or _WINDOW,
        )

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Q, K, V, O; K, V of the channel mixing."""
        return _matrices(config) + 2 * config.width * self.sizes(config).ffn_width

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Vectors of ROSA; blend of k, ln2; ln0 in layer 0, and in all where files have it."""
        return _vectors(config) + (1 + 2 + (2 if first or config.unused_norms else 0)) * config.width

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """The choice of a number for each channel; lookups compare integers, which are not counted."""
        return config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Last inputs of both mixings, and what lookups keep."""
        shift = StateArray((config.width,), (None,), config.dtype)
        return shift, shift, *_lookup_state(config)

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """None: it has no WKV operator."""
        return None, f"{self.a_title} has no such operator"

    def recognizes(self, in_layers: Collection[str], shapes: Shapes) -> bool:
        """By its matrices, without time mixing."""
        return _IN_LAYERS in in_layers and _TIME_MIX not in in_layers

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """Whether later layers have ln0; bits of a symbol are in no tensor."""
        return {"unused_norms": "blocks.1.ln0.weight" in shapes}

    def fields_in_name(self, name: str) -> dict[str, Any]:
        """Bits of a symbol, as in rwkv-rosa4bit-minipile-loss3dot44-20260221-ctx512.pth."""
        return {"rosa_bits": int(bits[1])} if (bits := re.search(r"rosa([1-8])bit", name)) else {}


class RosaBesideRWKV7Spec(RWKV7Spec):
    """RWKV-7, in whose layers ROSA adds its answers to what time mixing adds."""

    name = "7-rosa"
    model_class = "rwkv_jax.models.rwkv7_rosa:RWKV7Rosa"
    own_fields = (*RWKV7Spec.own_fields, *_FIELDS)
    fields_beside_tensors = (*RWKV7Spec.fields_beside_tensors, "rosa_bits")
    has_matrix_state = False
    recipe = None

    @property
    def title(self) -> str:
        """Both."""
        return "RWKV-7 with ROSA"

    def check(self, config: ModelConfig) -> None:
        """Whole symbols."""
        super().check(config)
        _check(config)

    def check_run(self, run: TrainConfig) -> None:
        """Refuses meshes that split time or symbols."""
        super().check_run(run)
        _check_run(run, self.title)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """RWKV-7's; 1 bit; the last 1024 tokens."""
        bits, window = config.rosa_bits or 1, config.rosa_window or _WINDOW
        return dataclasses.replace(super().sizes(config), rosa_bits=bits, rosa_window=window)

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7's, and Q, K, V, O."""
        return super().matrix_parameters(config, first=first) + _matrices(config)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7's without ln0, and vectors of ROSA."""
        norm = 2 * config.width if first else 0
        return super().other_parameters(config, first=first) - norm + _vectors(config)

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Of the recurrence, and the choice of a number for each channel."""
        return super().mixing_flops(config, sequence_length) + config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """RWKV-7's, the last input of ROSA, and what lookups keep."""
        shift, *others = super().state(config)
        return shift, *others, shift, *_lookup_state(config)

    def recognizes(self, in_layers: Collection[str], shapes: Shapes) -> bool:
        """By the matrices of both."""
        return _IN_LAYERS in in_layers and _TIME_MIX in in_layers
