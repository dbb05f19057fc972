"""What the baselines have in common: mixers of other papers in the Transformer's block, to compare RWKV with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.checks import checker
from rwkv_jax.config.generations.base import GenerationSpec, ResolvedSizes

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig
    from rwkv_jax.config.run import TrainConfig

CONVOLUTION_SIZE = 4
"""Tokens that a short convolution sees, its own among them."""


class BaselineSpec(GenerationSpec):
    """A model with a state of constant size, trained on one device or on a mesh that splits rows and weights."""

    article = "a"
    has_official_names = False
    packs = False

    def check(self, config: ModelConfig) -> None:
        """Refuses an implementation of an operator that the model does not have."""
        named = config.wkv_implementation is None or self.operator is not None
        remedy = f"{self.a_title} has no WKV operator; leave it out"
        checker(config, "model")(named, "wkv_implementation", remedy)

    def check_run(self, run: TrainConfig) -> None:
        """Refuses meshes that split heads or time."""
        check = checker(run)
        for axis, what in (("tensor", "heads"), ("sequence", "time")):
            remedy = f"{self.a_title} is not split over {what}; use parallel.data or fsdp"
            check(getattr(run.parallel, axis) == 1, f"parallel.{axis}", remedy)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 4 C."""
        return ResolvedSizes(config.ffn_width or 4 * config.width)

    def feed_forward_parameters(self, config: ModelConfig) -> int:
        """K, V of the feed-forward network."""
        return 2 * config.width * self.sizes(config).ffn_width

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """None for a model without an operator."""
        if self.operator is None:
            return None, f"{self.a_title} has no such operator"
        return super().prefill_implementation(platform)
