"""The simple recurrent network (Elman, 1990): one vector of hidden units, with tanh."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rwkv_jax.config.generations.base import StateArray
from rwkv_jax.config.generations.baseline import BaselineSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RNNSpec(BaselineSpec):
    """The tanh RNN."""

    name = "rnn"
    article = "an"
    model_class = "rwkv_jax.models.rnn:RNN"
    operator = None
    has_heads = False
    num_gates: ClassVar[int] = 1
    """Vectors of the width that a token computes."""

    @property
    def title(self) -> str:
        """Without a generation."""
        return "RNN"

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Of inputs and hidden units, O; the feed-forward network."""
        return (2 * self.num_gates + 1) * config.width**2 + self.feed_forward_parameters(config)

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """ln1, ln2; two biases, as PyTorch has them."""
        return (4 + 2 * self.num_gates) * config.width

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Two sums and tanh."""
        return 3 * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The hidden units."""
        return (StateArray((config.width,), (None,), config.parameter_dtype),)
