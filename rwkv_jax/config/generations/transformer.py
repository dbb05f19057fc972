"""A plain Transformer to compare RWKV with: its state is a key-value cache that grows with the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.checks import checker
from rwkv_jax.config.generations.base import CacheSpec, ResolvedSizes, StateArray

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class TransformerSpec(CacheSpec):
    """The Transformer, which has no generations."""

    name = "transformer"
    article = "a"
    model_class = "rwkv_jax.models.transformer:Transformer"
    own_fields = ("context_length", "rwkv_layers")
    operator = None
    has_official_names = False

    @property
    def title(self) -> str:
        """Without a generation."""
        return "Transformer"

    def check(self, config: ModelConfig) -> None:
        """Requires an even head size and none of RWKV's own fields."""
        check = checker(config, "model")
        check(config.head_dim % 2 == 0, "head_dim", "must be even: positions rotate pairs of channels")
        remedy = f"{self.a_title} has no WKV operator; leave it out"
        check(config.wkv_implementation is None, "wkv_implementation", remedy)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C; room for 2048 tokens."""
        return ResolvedSizes(config.ffn_width or 4 * config.width, context_length=config.context_length or 2048)

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Q, K, V, O; K, V of the feed-forward network."""
        return self.attention_matrices(config) + 2 * config.width * self.sizes(config).ffn_width

    def attention_matrices(self, config: ModelConfig) -> int:
        """Q, K, V, O."""
        return 4 * config.width**2

    def attention_vectors(self, config: ModelConfig) -> int:
        """None."""
        return 0

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2."""
        return 4 * config.width

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """4 N per head and visible key, of which there are (T + 1) / 2 on average."""
        return 2 * config.num_heads * config.head_dim * ((sequence_length or self.sizes(config).context_length) + 1)

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Keys and values of every token, and the number of tokens."""
        shape = (config.num_kv_heads, self.sizes(config).context_length, config.head_dim)
        cache = StateArray(shape, ("heads", None, None), config.dtype)
        return cache, cache, StateArray((), (), "int32")

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """None: it has no WKV operator."""
        return None, f"{self.a_title} has no such operator"
