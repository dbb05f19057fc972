"""RWKV-4 "Dove" (arXiv 2305.13048): decay and bonus are vectors, and the recurrence works on single channels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rwkv_jax.config.generations.base import OFFICIAL_OPTIMIZER, GenerationSpec, Recipe, ResolvedSizes, StateArray

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RWKV4Spec(GenerationSpec):
    """RWKV-4."""

    name = "4"
    own_fields = ("embedding_bound",)
    model_class = "rwkv_jax.models.rwkv4:RWKV4"
    operator = "wkv4"
    has_heads = False
    tensors = frozenset({"att.time_decay"})
    recipe = Recipe(
        corpus="data/pile_20B_tokenizer_text_document",
        num_tokens=332_115_325_534,
        tokenizer="20B_tokenizer.json",
        vocab_size=50277,
        sequence_length=1024,
        has_embedding_bound=True,
        optimizer=dataclasses.replace(
            OFFICIAL_OPTIMIZER, schedule="exponential", warmup_steps=0, epsilon=1e-8, weight_decay=0.0
        ),
    )

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C."""
        return ResolvedSizes(config.ffn_width or 4 * config.width)

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """R, K, V, O of the time mixing; K, V, R of the channel mixing."""
        return 4 * config.width**2 + 2 * config.width * self.sizes(config).ffn_width + config.width**2

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Blends of r, k, v, decay and bonus; blends of r, k; ln1, ln2, and ln0 in layer 0."""
        return (3 + 2 + 2 + 4 + (2 if first else 0)) * config.width

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """12 per channel: decay, write and read with the bonus for numerator and denominator each; the quotient."""
        return 12 * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Last inputs of both mixings; numerator, denominator and largest exponent of each channel."""
        shift = StateArray((config.width,), (None,), config.dtype)
        channels = StateArray((config.width,), ("heads",), config.parameter_dtype)
        return shift, shift, channels, channels, channels
