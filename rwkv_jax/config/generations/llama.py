"""Llama 2 and 3, Qwen2 and Qwen3: Transformers of other people, to learn from (rwkv_jax/models/llama.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from rwkv_jax.checks import checker, is_number
from rwkv_jax.config.generations.base import ResolvedSizes
from rwkv_jax.config.generations.transformer import TransformerSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig

_FFN_MULTIPLE = 32


class LlamaSpec(TransformerSpec):
    """The decoder of these four, which differ in the fields below."""

    name = "llama"
    model_class = "rwkv_jax.models.llama:Llama"
    own_fields = (
        "context_length",
        "rwkv_layers",
        "attention_heads",
        "kv_heads",
        "rotary_base",
        "rotary_scaling",
        "norm_epsilon",
        "qkv_bias",
        "qk_norm",
        "tied_head",
    )

    @property
    @override
    def title(self) -> str:
        return "Llama"

    @override
    def check(self, config: ModelConfig) -> None:
        """Requires groups of equal size, and a scaling that Llama 3 could have."""
        super().check(config)
        check = checker(config, "model")
        remedy = f"must divide the {config.num_heads} heads of the queries, of which each group shares one"
        check(config.num_heads % config.num_kv_heads == 0, "kv_heads", remedy)
        scaling = config.rotary_scaling
        if scaling is None:
            return
        is_possible = len(scaling) == 4 and all(is_number(x) and x > 0 for x in scaling) and scaling[1] < scaling[2]
        remedy = "must be four positive numbers: factor, low_freq_factor < high_freq_factor, original positions"
        check(is_possible, "rotary_scaling", remedy)

    @override
    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 8/3 C, so that three matrices have the parameters of the Transformer's two; room for 2048 tokens."""
        ffn_width = _FFN_MULTIPLE * max(round(8 * config.width / 3 / _FFN_MULTIPLE), 1)
        return ResolvedSizes(
            config.ffn_width or ffn_width,
            context_length=config.context_length or 2048,
            attention_heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            rotary_base=config.rotary_base or 10000.0,
            norm_epsilon=config.norm_epsilon or 1e-5,
        )

    @override
    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Q, K, V, O; gate, K and V of the feed-forward network."""
        return self.attention_matrices(config) + 3 * config.width * self.sizes(config).ffn_width

    @override
    def attention_matrices(self, config: ModelConfig) -> int:
        """Q, K, V, O."""
        return 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim

    @override
    def attention_vectors(self, config: ModelConfig) -> int:
        """Biases of Q, K, V; norms of queries and keys."""
        biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return config.qkv_bias * biases + config.qk_norm * 2 * config.head_dim

    @override
    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2; those of attention."""
        return 2 * config.width + self.attention_vectors(config)

    @override
    def outer_parameters(self, config: ModelConfig) -> int:
        """One matrix if the head is tied, and a norm without bias."""
        return (1 if config.tied_head else 2) * config.vocab_size * config.width + config.width
