"""RWKV-5 "Eagle" (arXiv 2404.05892), which is 5.2, and its previews 5.0 and 5.1: the state is a matrix per head."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from rwkv_jax.config.generations.base import MatrixStateSpec, ResolvedSizes, Shapes

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig


class RWKV5Spec(MatrixStateSpec):
    """RWKV-5.2, or one of its previews."""

    model_class = "rwkv_jax.models.rwkv5:RWKV5"
    operator = "wkv5"
    has_matrix_state = True
    heads_tensor = "att.time_decay"

    def __init__(self, name: str, *, has_gate: bool = True, has_channel_decay: bool = False) -> None:
        self.name = name
        self.has_gate = has_gate
        """Whether the output has a gate G, compensated by a narrower F; not in 5.0."""
        self.has_channel_decay = has_channel_decay
        """Whether decay and bonus are per channel of a head, [H, N]; in the previews per head, [H]."""
        self.own_fields = () if has_channel_decay else ("exponential_bonus",)

    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """F = 3.5 C rounded down to a multiple of 32; 4 C in 5.0."""
        return ResolvedSizes(config.ffn_width or (gated_ffn_width(config.width) if self.has_gate else 4 * config.width))

    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """R, K, V, O and G of the time mixing; K, V, R of the channel mixing."""
        squares = (5 if self.has_gate else 4) + 1
        return squares * config.width**2 + 2 * config.width * self.sizes(config).ffn_width

    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Blends of r, k, v, g, ln_x, decay and bonus; blends of r, k; ln1, ln2, and ln0 in layer 0."""
        blends = 4 if self.has_gate else 3
        decay_and_bonus = 2 * (config.width if self.has_channel_decay else config.num_heads)
        return (blends + 2 + 2 + 4 + (2 if first else 0)) * config.width + decay_and_bonus

    def recognizes(self, in_layers: Collection[str], shapes: Shapes) -> bool:
        """Identified by the norm over heads, the shape of the decay and whether there is a gate."""
        decay = shapes.get("blocks.0.att.time_decay", ())
        return (
            "att.ln_x.weight" in in_layers
            and (not self.has_channel_decay or (len(decay) == 2 and decay[1] > 1))
            and (not self.has_gate or self.has_channel_decay or "att.gate.weight" in in_layers)
        )

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """The kind of the previews' bonus, from its name."""
        return {name: "blocks.0.att.time_first" in shapes for name in self.own_fields}


def gated_ffn_width(width: int) -> int:
    """3.5 C in multiples of 32, and at least 32: the official rounding would give 0 for narrow models."""
    return max(32, 7 * width // 2 // 32 * 32)
