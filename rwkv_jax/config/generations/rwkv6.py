"""RWKV-6 "Finch" (arXiv 2404.05892): token shift and decay depend on the data, by low-rank maps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rwkv_jax.config.generations.base import OFFICIAL_OPTIMIZER, MatrixStateSpec, Recipe, ResolvedSizes, Shapes, size_of
from rwkv_jax.config.generations.rwkv5 import gated_ffn_width

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RWKV6Spec(MatrixStateSpec):
    """RWKV-6."""

    name = "6"
    model_class = "rwkv_jax.models.rwkv6:RWKV6"
    own_fields = ("mix_rank", "decay_rank")
    operator = "wkv6"
    has_matrix_state = True
    heads_tensor = "att.time_faaaa"
    tensors = frozenset({"att.time_maa_x"})
    low_rank_decay = frozenset({"att.time_decay_w1", "att.time_decay_w2"})
    low_rank = low_rank_decay | {"att.time_maa_w1", "att.time_maa_w2"}
    recipe = Recipe(
        corpus="data/world_text_document",
        num_tokens=1_120_000_000_000,
        tokenizer="world",
        vocab_size=65536,
        sequence_length=4096,
        optimizer=dataclasses.replace(OFFICIAL_OPTIMIZER, weight_decay=0.001),
    )

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 3.5 C rounded down to a multiple of 32; ranks 32 and 64, or twice that from C = 4096 on, as released."""
        wide = 2 if config.width >= 4096 else 1
        return ResolvedSizes(
            ffn_width=config.ffn_width or gated_ffn_width(config.width),
            mix_rank=config.mix_rank or 32 * wide,
            decay_rank=config.decay_rank or 64 * wide,
        )

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """R, K, V, G, O, five low-rank mixes and that of the decay; K, V, R of the channel mixing."""
        sizes, width = self.sizes(config), config.width
        return 6 * width**2 + 2 * width * (5 * sizes.mix_rank + sizes.decay_rank + sizes.ffn_width)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Blends of x, w, k, v, r, g, decay and bonus, ln_x; blends of k, r; ln1, ln2, and ln0 in layer 0."""
        return (6 + 2 + 2 + 2 + 4 + (2 if first else 0)) * config.width

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """Ranks; the five mixes are stacked in one matrix."""
        stacked = size_of(shapes, "blocks.0.att.time_maa_w1", 1)
        return {
            "mix_rank": None if stacked is None else stacked // 5,
            "decay_rank": size_of(shapes, "blocks.0.att.time_decay_w1", 1),
        }
