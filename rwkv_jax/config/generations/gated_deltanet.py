"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a decay of the whole state, and an output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.config.generations.deltanet import DeltaNetSpec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class GatedDeltaNetSpec(DeltaNetSpec):
    """Gated DeltaNet."""

    name = "gated_deltanet"
    model_class = "rwkv_jax.models.gated_deltanet:GatedDeltaNet"

    @property
    def title(self) -> str:
        """Without a generation."""
        return "Gated DeltaNet"

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """DeltaNet's, the output gate's and the decay's."""
        width = config.width
        return super().matrix_parameters(config, first=first) + width**2 + config.num_heads * width

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """DeltaNet's; the decay's rate and bias of each head."""
        return super().other_parameters(config, first=first) + 2 * config.num_heads
