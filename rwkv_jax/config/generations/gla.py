"""Gated linear attention (arXiv 2312.06635): linear attention whose state decays by channel, as the data say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.checks import checker
from rwkv_jax.config.generations.base import StateArray
from rwkv_jax.config.generations.baseline import BaselineSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig

GATE_RANK = 16
"""D of the decay's low-rank map."""


class GLASpec(BaselineSpec):
    """GLA, with keys of half the size of values."""

    name = "gla"
    model_class = "rwkv_jax.models.gla:GLA"
    operator = "wkv6"

    @property
    def title(self) -> str:
        """Without a generation."""
        return "GLA"

    def check(self, config: ModelConfig) -> None:
        """Requires heads that can be halved."""
        super().check(config)
        checker(config, "model")(config.head_dim % 2 == 0, "head_dim", "must be even: keys have half of it")

    def operator_sizes(self, config: ModelConfig) -> tuple[int, int, int]:
        """Keys of N / 2."""
        return config.num_heads, config.head_dim // 2, config.head_dim

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Q and K of half the width, V, G, O, the decay's low-rank map; the feed-forward network."""
        width = config.width
        return 4 * width**2 + GATE_RANK * (width + width // 2) + self.feed_forward_parameters(config)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2; the decay's bias; ln_x."""
        return 4 * config.width + config.width // 2 + config.head_dim

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Per number of the state: decay (1), add k v^T (2), read (2)."""
        return 5 * config.width * config.head_dim // 2

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The matrix of each head."""
        heads = (config.num_heads, config.head_dim, config.head_dim // 2)
        return (StateArray(heads, ("heads", None, None), config.parameter_dtype),)
