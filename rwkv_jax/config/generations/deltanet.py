"""DeltaNet (arXiv 2406.06484): linear attention that writes by the delta rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.config.generations.base import StateArray
from rwkv_jax.config.generations.baseline import CONVOLUTION_SIZE, BaselineSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class DeltaNetSpec(BaselineSpec):
    """DeltaNet."""

    name = "deltanet"
    model_class = "rwkv_jax.models.deltanet:DeltaNet"
    own_fields = ("negative_eigenvalues",)
    operator = "wkv7"

    @property
    def title(self) -> str:
        """Without a generation."""
        return "DeltaNet"

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Q, K, V, O, beta's; the short convolutions, which multiply once a token, too; the feed-forward network."""
        width = config.width
        mixing = 4 * width**2 + config.num_heads * width + 3 * CONVOLUTION_SIZE * width
        return mixing + self.feed_forward_parameters(config)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2; ln_x."""
        return 4 * config.width + config.head_dim

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """As RWKV-7's, whose operator it is."""
        return 9 * config.head_dim * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The last inputs of the convolutions, and the matrix of each head."""
        heads = (config.num_heads, config.head_dim, config.head_dim)
        return (
            StateArray((CONVOLUTION_SIZE - 1, 3 * config.width), (None, None), config.dtype),
            StateArray(heads, ("heads", None, None), config.parameter_dtype),
        )
