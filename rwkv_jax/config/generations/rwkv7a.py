"""RWKV-7a and 7b: RWKV-7 with tables of numbers by token, and 7b with an attention whose cache grows with the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rwkv_jax.config.generations.base import CacheSpec, ResolvedSizes, Shapes, StateArray, size_of
from rwkv_jax.config.generations.rwkv7 import RWKV7Spec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RWKV7aSpec(RWKV7Spec):
    """RWKV-7 with DeepEmbed."""

    name = "7a"
    model_class = "rwkv_jax.models.rwkv7a:RWKV7a"
    own_fields = (*RWKV7Spec.own_fields, "deep_embed_rank")
    tensors = frozenset({"ffn.s_emb.weight"})
    low_rank = RWKV7Spec.low_rank | {"ffn.s1", "ffn.s2"}
    flat_vectors = frozenset({"ffn.s0"})
    table_maps: Mapping[str, str] = {"ffn.s_emb.weight": "ffn.s_emb_x.weight"}
    recipe = None

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """RWKV-7's; tables of 32 x 32 numbers a token."""
        return dataclasses.replace(super().sizes(config), deep_embed_rank=config.deep_embed_rank or 32)

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7's; s1, s2, s_emb_x of DeepEmbed."""
        sizes = self.sizes(config)
        rank = sizes.deep_embed_rank
        own = rank * (config.width + sizes.ffn_width) + rank**2 * config.width
        return super().matrix_parameters(config, first=first) + own

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7's; s0 and the table of DeepEmbed."""
        sizes = self.sizes(config)
        own = sizes.ffn_width + config.vocab_size * sizes.deep_embed_rank**2
        return super().other_parameters(config, first=first) + own

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """RWKV-7's; the product with a token's own matrix."""
        return super().mixing_flops(config, sequence_length) + 2 * self.sizes(config).deep_embed_rank ** 2

    def table_row(self, config: ModelConfig) -> int:
        """D x D of DeepEmbed."""
        return self.sizes(config).deep_embed_rank ** 2

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """RWKV-7's, and the rank of DeepEmbed."""
        return super().read_fields(shapes) | {"deep_embed_rank": size_of(shapes, "blocks.0.ffn.s1", 1)}


class RWKV7bSpec(CacheSpec, RWKV7aSpec):
    """RWKV-7a with DEA, an attention beside the time mixing."""

    name = "7b"
    model_class = "rwkv_jax.models.rwkv7b:RWKV7b"
    own_fields = (*RWKV7aSpec.own_fields, "dea_width", "dea_rank", "context_length")
    tensors = frozenset({"qkv.qq.weight"})
    flat_vectors = RWKV7aSpec.flat_vectors | {f"qkv.x_{name}" for name in "qkv"}
    table_maps: Mapping[str, str] = {
        **RWKV7aSpec.table_maps,
        **{f"qkv.{name}_emb.weight": f"qkv.{name}_emb_x.weight" for name in "kv"},
    }
    low_rank = RWKV7aSpec.low_rank | {"qkv.k1", "qkv.k2", "qkv.v1", "qkv.v2"}
    has_matrix_state = False
    harmful_state_rate = None

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """RWKV-7a's; keys of 256 numbers, ranks of 32; room for the 4096 tokens of the released model's rows."""
        return dataclasses.replace(
            super().sizes(config),
            dea_width=config.dea_width or 256,
            dea_rank=config.dea_rank or 32,
            context_length=config.context_length or 4096,
        )

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7a's; qq, k_emb_x, v_emb_x; k1, k2, v1, v2."""
        sizes, width = self.sizes(config), config.width
        own = 2 * sizes.dea_width * width + width**2 + sizes.dea_rank * (3 * width + sizes.dea_width)
        return super().matrix_parameters(config, first=first) + own

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7a's; tables of keys and values, blends, and norms with weight and bias, of q, k and v."""
        keys, values = self.sizes(config).dea_width, config.width
        own = config.vocab_size * (keys + values) + 3 * (2 * keys + values)
        return super().other_parameters(config, first=first) + own

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """RWKV-7a's; 2 for each number of a visible key and value, of which there are (T + 1) / 2 on average."""
        sizes = self.sizes(config)
        visible = (sequence_length or sizes.context_length) + 1
        return super().mixing_flops(config, sequence_length) + (sizes.dea_width + config.width) * visible

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """RWKV-7's; keys and values of every token, and their number; the last q, k and v."""
        sizes = self.sizes(config)

        def array(*shape: int) -> StateArray:
            return StateArray(shape, (None,) * len(shape), config.dtype)

        keys, values = sizes.dea_width, config.width
        cache = (array(1, sizes.context_length, keys), array(1, sizes.context_length, values))
        return (*super().state(config), *cache, StateArray((), (), "int32"), array(keys), array(keys), array(values))

    def table_row(self, config: ModelConfig) -> int:
        """RWKV-7a's; a key's and a value's."""
        return super().table_row(config) + self.sizes(config).dea_width + config.width

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """RWKV-7a's, and the sizes of DEA."""
        names = {"dea_width": ("qq.weight", 0), "dea_rank": ("k1", 1)}
        own = {field: size_of(shapes, f"blocks.0.qkv.{name}", axis) for field, (name, axis) in names.items()}
        return super().read_fields(shapes) | own
