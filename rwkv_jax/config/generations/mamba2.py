"""Mamba-2 (arXiv 2405.21060): a state space model with one decay a head, the state space dual (SSD)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.config.generations.base import ResolvedSizes, StateArray
from rwkv_jax.config.generations.baseline import CONVOLUTION_SIZE, BaselineSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class Mamba2Spec(BaselineSpec):
    """Mamba-2's layer in the baselines' block: 2 C inner channels in heads of N, one group of keys and queries."""

    name = "mamba2"
    model_class = "rwkv_jax.models.mamba2:Mamba2"
    own_fields = ("state_size",)
    operator = "wkv6"

    @property
    def title(self) -> str:
        """Without a generation."""
        return "Mamba-2"

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C; S = 128."""
        return ResolvedSizes(config.ffn_width or 4 * config.width, state_size=config.state_size or 128)

    def operator_sizes(self, config: ModelConfig) -> tuple[int, int, int]:
        """Twice the heads, keys of S."""
        return 2 * config.num_heads, self.sizes(config).state_size, config.head_dim

    def _convolved(self, config: ModelConfig) -> int:
        return 2 * config.width + 2 * self.sizes(config).state_size

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Those of gate, values, keys, queries and time steps; the convolution; O; the feed-forward network."""
        width, convolved, heads = config.width, self._convolved(config), 2 * config.num_heads
        into = width * (2 * width + convolved + heads)
        return into + CONVOLUTION_SIZE * convolved + 2 * width**2 + self.feed_forward_parameters(config)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2; the convolution's bias; rate, time step and skip of each head; ln_x."""
        return 4 * config.width + self._convolved(config) + 6 * config.num_heads + 2 * config.width

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Per number of the state: decay (1), add k v^T (2), read (2)."""
        return 5 * 2 * config.width * self.sizes(config).state_size

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The last inputs of the convolution, and the matrix of each head."""
        heads = (2 * config.num_heads, config.head_dim, self.sizes(config).state_size)
        return (
            StateArray((CONVOLUTION_SIZE - 1, self._convolved(config)), (None, None), config.dtype),
            StateArray(heads, ("heads", None, None), config.parameter_dtype),
        )
