"""Long short-term memory (Hochreiter and Schmidhuber, 1997): an RNN with cells behind gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.config.generations.base import StateArray
from rwkv_jax.config.generations.rnn import RNNSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class LSTMSpec(RNNSpec):
    """The LSTM with a forget gate."""

    name = "lstm"
    model_class = "rwkv_jax.models.lstm:LSTM"
    num_gates = 4

    @property
    def title(self) -> str:
        """Without a generation."""
        return "LSTM"

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Of each gate two sums and its sigmoid or tanh; two products and a sum for the cell, tanh and a product."""
        return 17 * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The hidden units, and the cells."""
        return 2 * super().state(config)
