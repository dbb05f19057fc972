"""RWKV-8's experimental release rc00: RWKV-7 whose channel mixing is scaled by a vector of the token in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.config.generations.rwkv7 import RWKV7Spec

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RC00Spec(RWKV7Spec):
    """RWKV-7 with a table of C numbers a token in every channel mixing; not a released generation."""

    name = "8-rc00"
    model_class = "rwkv_jax.models.rc00:RC00"
    tensors = frozenset({"ffn.enn.weight"})
    recipe = None

    @property
    def title(self) -> str:
        """The release's own name."""
        return "RWKV-8 rc00"

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """RWKV-7's, and the table."""
        return super().other_parameters(config, first=first) + config.vocab_size * config.width

    def table_row(self, config: ModelConfig) -> int:
        """C."""
        return config.width
